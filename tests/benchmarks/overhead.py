"""What the platform costs beside the stages' own work, on a cluster of real raylets on this machine.

    python -m tests.benchmarks.overhead sweep        # the demo's sweep as a job: share of the wall time
    python -m tests.benchmarks.overhead trials       # 70 trials as a job: seconds a trial
    python -m tests.benchmarks.overhead arrival      # from a node's arrival to its first useful work
    python -m tests.benchmarks.overhead refusal      # until a request that never fits is refused
    python -m tests.benchmarks.overhead imports      # processor time before a process can work, n = 5

Each prints one JSON line. Own work is the time in which at least one stage or trial computes: a training
loop by its own clock, a pool by what its rows take in this process afterwards, without Ray. All else counts
as overhead, the start of the job and the report included.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from diffult_ray import files
from diffult_ray.allotment import ALONE
from diffult_ray.stages import SHARED, Order, pool, quality
from tests.benchmarks.measure import summary, tell
from tests.machines import RAY, ROOT, Cluster, wait_for

CPUS = 2
SEEDS = "search.classifier.seed.grid=[0,1,2,3,4]"  # of 14 cells: 70 trials


def submit(cluster: Cluster, storage: Path, *arguments: str) -> tuple[float, float]:
    """When the job was submitted, and when it had ended."""
    command = [sys.executable, "-m", "diffult_ray.sweep", *arguments, "--storage", str(storage)]
    start = time.time()
    done = subprocess.run(
        [*RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *command],
        cwd=ROOT, env=cluster.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    print(done.stdout, file=sys.stderr)
    return start, time.time()


# --- own work ---


def manifests(storage: Path) -> list[dict[str, Any]]:
    found = sorted((storage / "artifacts").glob("*/*/manifest.json"))
    return [{**files.read_json(path), "folder": path.parent} for path in found]


def own_seconds(manifest: dict[str, Any], storage: Path) -> float:
    """What a stage computes, without the platform around it."""
    if "train_seconds" in manifest["summary"]:
        return manifest["summary"]["train_seconds"] or 0.0
    bare = {"images": bare_images, "scores": bare_scores, "quality": bare_quality}.get(manifest["stage"])
    if bare is None:
        return manifest["seconds"] if manifest["stage"] == "split" else 0.0
    torch.set_num_threads(1)
    inputs = {name: storage / "artifacts" / name / key for name, key in manifest["inputs"].items()}
    return timed(lambda: bare(manifest, inputs))


def timed(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def bare_images(manifest: dict[str, Any], inputs: dict[str, Path]) -> None:
    from diffult_ray.stages.sampler import Sampler

    table = pool.read_pool(manifest["folder"]).table
    sampler = Sampler(inputs["generator"], manifest["config"], torch.device("cpu"))
    pool.encode(sampler(table["label"].to_numpy(), table["seed"].to_numpy()))


def bare_scores(manifest: dict[str, Any], inputs: dict[str, Path]) -> None:
    from diffult_ray.stages.scores import Scorer

    folders = {name: inputs[name] for name in ("extractor", "split")}
    target = {"config": manifest["config"], "site": SHARED, **folders}
    rows = pool.read_pool(inputs["images"]).table.select(pool.IMAGE_SCHEMA.names)
    Scorer(target, torch.device("cpu"))(rows)


def bare_quality(manifest: dict[str, Any], inputs: dict[str, Path]) -> None:
    out = Path(tempfile.mkdtemp(prefix="dq-"))
    order = Order(manifest["config"], inputs, out, out)
    rows = quality._wanted(order)
    measures = quality.Measures(rows, quality.Real(inputs["reference"], inputs["split"]))
    measures.update(quality.MeasureRows(targets=[quality._target(order)], given=ALONE)(
        rows.append_column("target", pa.array([0] * len(rows), type=pa.int64()))
    ))  # fmt: skip
    quality._finish(order, measures)
    shutil.rmtree(out)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


# --- the benchmarks ---


def sweep(cluster: Cluster, storage: Path) -> dict[str, Any]:
    cluster.up(cpus=CPUS)
    start, end = submit(cluster, storage, "digits")
    found = manifests(storage)
    work = covered((m["created"] - own_seconds(m, storage), m["created"]) for m in found)
    first = min(m["created"] - m["seconds"] for m in found)
    return {
        "wall_s": round(end - start, 1), "own_work_s": round(work, 1),
        "overhead_percent": round(100 * (1 - work / (end - start)), 1),
        "until_the_first_stage_s": round(first - start, 1),
        "after_the_last_trial_s": round(end - max(m["created"] for m in found), 1),
    }


def trials(cluster: Cluster, storage: Path) -> dict[str, Any]:
    cluster.up(cpus=CPUS)
    submit(cluster, storage, "digits", SEEDS)
    found = [m for m in manifests(storage) if m["stage"] == "classifier"]
    before = [m["created"] for m in manifests(storage) if m["stage"] != "classifier"]
    span = max(m["created"] for m in found) - max(before)
    training = sum(m["summary"]["train_seconds"] for m in found) / len(found)
    return {
        "trials": len(found), "trial_training_s": round(training, 2),
        "trial_overhead_s": round(CPUS * span / len(found) - training, 2),
    }


def arrival(cluster: Cluster, storage: Path) -> dict[str, Any]:
    """The first node's: a trial waits for it, whose stages before it are stored."""
    cluster.up()
    node = cluster.add(cpus=1)
    done = subprocess.Popen(
        [sys.executable, "-m", "diffult_ray.sweep", "digits", "method=ce", "tracking.enabled=false",
         "classifier.steps=20000", "--storage", str(storage), "--address", cluster.address],
        cwd=ROOT, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def progress() -> set[Path]:
        return set((storage / "work").glob("classifier-*/*/progress.json"))

    wait_for(progress, 300)
    node.vanish()
    wait_for(lambda: len(cluster.nodes()) == 1, 120)
    for path in progress():
        path.unlink()
    cluster.add(cpus=1)
    came = time.time()
    wait_for(progress, 300)
    seconds = time.time() - came
    done.kill()
    done.wait()
    return {"arrival_to_work_s": round(seconds, 1)}


def refusal(cluster: Cluster, storage: Path) -> dict[str, Any]:
    cluster.up(cpus=CPUS)

    def refused() -> None:
        code = subprocess.run(
            [sys.executable, "-m", "diffult_ray.sweep", "digits", "resources.generator.workers=50",
             "--storage", str(storage), "--address", cluster.address],
            cwd=ROOT, env=cluster.environment, capture_output=True,
        ).returncode  # fmt: skip
        assert code == 3, code

    return {"refusal_s": round(timed(refused), 1)}


IMPORTS = {
    "a worker of Ray": "import ray",
    "a classifier": "import ray; import torch._dynamo; from diffult_ray.stages import classifier",
    "a U-Net": "import ray; from diffusers import UNet2DModel; import torch._dynamo",
    "a U-Net under Train": "import ray.train.torch; from diffusers import UNet2DModel; import torch._dynamo",
}


def imports(cluster: Cluster, storage: Path) -> dict[str, Any]:
    """Of a process that only imports; torch._dynamo is what any optimizer imports."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(6):
        for name, code in IMPORTS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            taken[name].append(spent)
    return {"cpu_seconds": {name: summary(each[1:], 2) for name, each in taken.items()}}  # the disk is warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    benchmarks = {f.__name__: f for f in (sweep, trials, arrival, refusal, imports)}
    parser.add_argument("benchmark", choices=benchmarks)
    name = parser.parse_args().benchmark
    folder = Path(tempfile.mkdtemp(prefix="do-"))
    cluster = Cluster(folder / "c")
    try:
        found = benchmarks[name](cluster, folder / "storage")
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
    tell(name, packages=("torch", "ray"), **found)


if __name__ == "__main__":
    main()
