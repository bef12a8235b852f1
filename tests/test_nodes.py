"""Sweeps on several raylets: equal results, machines that vanish, jobs that stop, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from diffult_ray.store import Store
from tests.building import Building
from tests.conftest import MEASURED, TINY, driver_of, temporary_folder
from tests.machines import RAY, ROOT, Cluster, Machine, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

SWEEP = """
name: nodes
experiment:
  dataset: {name: digits, imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}
  extractor: &recipe {architecture: cnn, steps: 1500, batch_size: 32, learning_rate: 0.05, crop_padding: 1,
                      flip: false, schedule: cosine, warmup: 0.1}
  generator: {channels: [16, 32], blocks: 1, attention: [], dropout: 0.0, steps: 500, batch_size: 32,
              learning_rate: 2.0e-3, warmup_steps: 10, ema: 0.98, flip: false}
  generation: {per_class: 60, sampler: ddim, steps: 60, guidance: 0.5}
  classifier: {<<: *recipe, steps: 3000, synthetic_weight: 0.5}
  quality: {images: 200, reference: *recipe}
  resources: {generator: {workers: 2, cpus: 0.5}, scores: {compute: actors}}
tracking: {enabled: false}
search:
  classifier.seed: {grid: [0, 1, 2, 3]}
"""
TITLES = {  # of the processes of a stage
    "extractor": "ray::extractor", "generator": "RayTrainWorker", "images": "SampleRows",
    "scores": "ScoreRows", "classifier": "ray::ImplicitFunc",
}  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path."""
    yield from temporary_folder()


@pytest.fixture
def cluster(folder: Path) -> Iterator[Cluster]:
    made = Cluster(folder / "c")
    try:
        yield made
    finally:
        made.down()


class Sweep:
    """`python -m diffult_ray.sweep` on a cluster, with a storage of its own."""

    def __init__(self, cluster: Cluster, storage: Path, text: str = SWEEP) -> None:
        storage.mkdir(parents=True, exist_ok=True)
        self.cluster, self.store, self.file = cluster, Store(storage), storage / "sweep.yaml"
        self.file.write_text(text)
        self.name = yaml.safe_load(text)["name"]

    def command(self, *arguments: str) -> list[str]:
        where = ["--storage", str(self.store.root), "--address", self.cluster.address]
        return [sys.executable, "-m", "diffult_ray.sweep", str(self.file), *where, *arguments]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), cwd=ROOT, env=self.cluster.environment | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0, seconds: float = 900, **environment: str) -> str:
        process = self.start(*arguments, **environment)
        try:
            out, _ = process.communicate(timeout=seconds)
        except BaseException:
            process.kill()
            raise
        assert process.returncode == code, out
        return out

    @property
    def results(self) -> pd.DataFrame:
        """What a trial measured; nothing of how long it took."""
        table = pd.read_parquet(self.store.root / "sweeps" / self.name / "results.parquet")
        return table.drop(columns=MEASURED).sort_values("trial", ignore_index=True)

    @property
    def manifests(self) -> dict[Path, int]:
        found = (self.store.root / "artifacts").glob("*/*/manifest.json")
        return {path: path.stat().st_mtime_ns for path in found}

    def is_under_way(self, name: str) -> bool:
        """Whether a training of that name has told of progress, or a pool has been begun."""
        mark = "" if name in ("images", "scores") else "/*/progress.json"
        return any((self.store.root / "work").glob(f"{name}-*{mark}"))


def test_the_same_sweep_on_one_two_and_four_machines_gives_the_same_results(cluster, folder):
    """One with two CPUs, two and four with one each."""
    cluster.up(cpus=2)
    one = Sweep(cluster, folder / "one", TINY)
    one.run("tracking.enabled=false")
    cluster.down()
    many = Cluster(folder / "m").up()
    try:
        for count in (2, 4):
            while len(many.machines) < count + 1:
                many.add()
            other = Sweep(many, folder / str(count), TINY)
            assert f"{count} CPUs" in other.run("tracking.enabled=false")
            pd.testing.assert_frame_equal(one.results, other.results)
    finally:
        many.down()


def test_a_machine_that_vanishes_during_any_stage_changes_no_result(cluster, folder):
    cluster.up()
    for _ in range(2):
        cluster.add()
    expected = Sweep(cluster, folder / "undisturbed")
    expected.run()
    hit = Sweep(cluster, folder / "hit")
    process = hit.start()
    for stage, title in TITLES.items():

        def found(stage: str = stage, title: str = title) -> Machine | None:
            assert process.poll() is None, f"ended before {stage}: {process.stdout.read()}"
            return cluster.where(title) if hit.is_under_way(stage) else None

        victim = wait_for(found, 300)
        victim.vanish()
        del cluster.machines[victim.name]
        cluster.add()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    pd.testing.assert_frame_equal(expected.results, hit.results)


@pytest.mark.parametrize("name", ["images", "scores"])
def test_of_a_pool_only_what_a_vanished_machine_had_in_hand_is_made_again(cluster, folder, name):
    rows, made = 16, {}
    cluster.up()
    machines = [cluster.add(), cluster.add()]
    (folder / "sweep.yaml").write_text(SWEEP)
    build = Building(
        cluster, str(folder / "sweep.yaml"), folder / "s", name, f"resources.{name}.workers=2",
        "extractor.steps=100", "generation.per_class=120", "resources.generator.workers=1",
        "generator.steps=50", DIFFULT_TEST_ROWS=str(rows),
    )  # fmt: skip

    def look() -> int:
        for path in build.work.glob("*/parts/*.parquet"):
            if path.name not in made:
                made[path.name] = pq.read_table(path, columns=["seed"])["seed"].to_pylist()
        return len(made)

    wait_for(lambda: look() >= 4 or build.process.poll() is not None, 400)  # scores need all images first
    assert build.process.poll() is None, build.process.stdout.read()
    victim = wait_for(lambda: next((m for m in machines if m.processes(TITLES[name])), None))
    victim.vanish()
    wait_for(lambda: look() < 0 or build.process.poll() is not None, 600)
    build.end()
    seeds = [seed for part in made.values() for seed in part]
    again = len(seeds) - len(set(seeds))
    assert again <= 2 * rows, "a process has a batch in hand, and an actor one on its way to it"
    assert pq.read_table(build.folder / "pool").num_rows == build.summary["images"]


def test_what_lost_its_machine_before_it_started_is_given_up_in_one_line(cluster, folder):
    """The sweep fitted when it was checked; what does not need the lost machine is kept."""
    cluster.up()
    cluster.add(cpus=2)
    large = cluster.add(cpus=3)
    sweep = Sweep(cluster, folder / "s", TINY.replace("steps: 60", "steps: 3000"))
    process = sweep.start("resources.scores.cpus=3", DIFFULT_PLACEMENT_SECONDS="20")
    wait_for(lambda: sweep.is_under_way("extractor"))
    large.vanish()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1, out
    told = [line for line in out.splitlines() if "scores" in line and ": FAILED" in line]
    assert len(told) == 1 and "no place in 20 s (DIFFULT_PLACEMENT_SECONDS) for 1 x 3 CPUs" in told[0]
    assert "1 head x 0 + 1 node x 2 = 2 CPUs" in told[0] and "Traceback" not in out, out
    status = sweep.results.set_index("method")["status"]
    assert set(status[status.index == "ce"]) == {"done"}
    assert set(status[status.index == "diffult"]) == {"failed"}


def test_trials_that_lost_every_machine_are_given_up_in_one_line(cluster, folder):
    cluster.up()
    machine = cluster.add()
    sweep = Sweep(cluster, folder / "s", SWEEP.replace("steps: 3000", "steps: 30000"))
    process = sweep.start("method=ce", DIFFULT_PLACEMENT_SECONDS="20")
    wait_for(lambda: sweep.is_under_way("classifier"))
    machine.vanish()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1, out
    assert "FAILED, no place in 20 s (DIFFULT_PLACEMENT_SECONDS) for 1 x 1 CPUs" in out


def test_a_drained_machines_trial_is_saved_before_it_goes(cluster, folder):
    cluster.up()
    machine, notice = cluster.add(), 25
    sweep = Sweep(cluster, folder / "s", SWEEP.replace("steps: 3000", "steps: 15000"))
    process = sweep.start("method=ce", "search.classifier.seed.grid=[0]")

    def saved() -> list[Path]:
        return list((sweep.store.root / "work").glob("classifier-*/*/checkpoints/*/state.safetensors"))

    wait_for(lambda: sweep.is_under_way("classifier"))
    cluster.drain(machine, notice)
    wait_for(saved, notice)
    assert machine.processes("ray::ImplicitFunc")
    machine.vanish()
    cluster.add()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out


def test_a_job_that_was_stopped_continues_when_it_is_submitted_again(cluster, folder):
    cluster.up(cpus=2)
    sweep = Sweep(cluster, folder / "s", SWEEP.replace("steps: 3000", "steps: 15000"))

    def job(*arguments: str) -> str:
        done = subprocess.run(
            [*RAY, "job", arguments[0], "--address", cluster.dashboard, *arguments[1:]], cwd=ROOT,
            env=cluster.environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout + done.stderr

    submit = ("--working-dir", str(ROOT), "--", *sweep.command()[:-2])  # a job knows its cluster
    job("submit", "--submission-id", "first", "--no-wait", *submit)
    wait_for(lambda: len(sweep.manifests) >= 2 and sweep.is_under_way("classifier"), 400)
    job("stop", "first")
    wait_for(lambda: "was stopped" in job("status", "first"), 60)
    kept = sweep.manifests
    told = job("submit", "--submission-id", "again", *submit)
    assert "succeeded" in job("status", "again").lower(), told
    assert kept.items() <= sweep.manifests.items()
    assert set(sweep.results["status"]) == {"done"}
    assert "interrupted; the same command continues" in job("logs", "first")


def test_who_has_another_token_is_refused_in_one_line(cluster, folder):
    cluster.up(cpus=1)
    (folder / "other").write_text("0" * 64)
    out = Sweep(cluster, folder / "s").run(code=2, RAY_AUTH_TOKEN_PATH=str(folder / "other"))
    (told,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "--address: must be a Ray cluster that can be joined" in told
    assert not list((folder / "s").rglob("results.parquet"))


def test_a_request_that_can_never_fit_is_refused_with_its_sum(cluster, folder):
    cluster.up()
    cluster.add(cpus=2)
    out = Sweep(cluster, folder / "s").run("resources.generator.workers=5", code=3)
    assert "5 workers x 0.5 CPUs = 2.5 CPUs, but" in out
    assert "1 head x 0 + 1 node x 2 = 2 CPUs" in out
    assert not (folder / "s/sweeps").exists()


# --- GPUs: logical ones, on a machine without any ---


def test_a_gpu_stage_never_runs_on_a_processor_and_the_reverse_is_a_choice(cluster, folder):
    cluster.up()
    cluster.add(cpus=2, gpus=2)
    sweep = Sweep(cluster, folder / "s")
    out = sweep.run("resources.classifier.gpus=0.5", code=2)
    assert "offers 2 GPUs to Ray, nvidia-smi shows 0" in out
    build = Building(
        cluster, str(sweep.file), folder / "b", "extractor", "extractor.steps=20",
        "resources.extractor.gpus=0.5",
    )  # fmt: skip
    (told,) = [line for line in build.end(code=1).splitlines() if "FAILED" in line]
    assert "this stage was given 0.5 GPUs (CUDA_VISIBLE_DEVICES: 0), but torch sees none" in told
    assert not build.store.find(build.stage)
    small = ("generator.steps=20", "resources.generator.workers=1", "resources.images.gpus=0.5")
    build = Building(cluster, str(sweep.file), folder / "b", "images", *small)
    (told,) = [line for line in build.end(code=1).splitlines() if "FAILED" in line]
    assert "this stage was given 0.5 GPUs (CUDA_VISIBLE_DEVICES: 0), but torch sees none" in told
    chosen = Building(cluster, str(sweep.file), folder / "b", "extractor", "extractor.steps=20")
    chosen.end()
    assert chosen.store.find(chosen.stage)


# --- many trials ---

MANY = """
name: many
experiment:
  method: ce
  dataset: {name: digits, imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}
  classifier: {architecture: cnn, steps: 5, batch_size: 16, crop_padding: 1, flip: false, warmup: 0}
tracking: {enabled: false}
search:
  classifier.seed: {grid: [%s]}
"""


def test_two_hundred_trials_on_two_cpus_end_in_a_driver_of_constant_size(cluster, folder):
    trials, sizes = 200, []
    cluster.up(cpus=2)
    sweep = Sweep(cluster, folder / "s", MANY % ", ".join(map(str, range(trials))))
    process = sweep.start()
    statm = None
    for line in process.stdout:
        statm = statm or Path(f"/proc/{driver_of(process)}/statm")
        if "] trial " in line:
            sizes.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert process.wait(timeout=60) == 0
    assert len(sizes) == trials and set(sweep.results["status"]) == {"done"}
    quarters = [pd.Series(sizes[i : i + trials // 4]).median() for i in range(0, trials, trials // 4)]
    second, last = quarters[1], quarters[3]
    assert last < 1.1 * second, f"{second / 2**20:.0f} to {last / 2**20:.0f} MiB"


@pytest.fixture(autouse=True)
def _no_child_outlives_a_test() -> Iterator[None]:
    """A driver whose test has failed."""
    yield
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in map(int, children):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"diffult_ray.sweep" in line or b"tests.build_stage" in line:
            os.kill(pid, signal.SIGKILL)
