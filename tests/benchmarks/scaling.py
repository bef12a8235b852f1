"""Two workers against one, of one thread each: training of the generator, and generation.

    python tests/benchmarks/scaling.py --root DIR [--repeats 3] [--only training|generation] [--batch 64]
        [--paper --steps 84] [--apart]

CIFAR100-LT (imbalance factor 100) in DIR, a U-Net of 64-128-128 channels (`--paper`: the paper's, of 35.7 M
parameters; in 84 steps its first checkpoint lies before the images that count), 112 steps of batch 64, or as
many images in larger batches, or `--steps`; 984 images by DPM-Solver++ of 5 steps with guidance.
The whole stages on Ray, by turns; the rates are those of their loops, without the start of their processes.
`--apart`: in each turn also two trainings of one worker and half the batch, at once, that know nothing of
each other: what the machine and Ray leave for two workers that never wait. `apart` is the sum of their rates
over one worker's, `apart_slower` twice the slower one's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import summary, tell

from diffult_ray import build, cluster, pipeline
from diffult_ray.config import Experiment
from diffult_ray.store import Artifact, Store

BATCH, IMAGES = 64, 64 * 112
FIRST = 12 * 64  # the rate is that of the images after the first, or of the last six sevenths
SMALL = {"channels": [64, 128, 128], "blocks": 1, "attention": [16]}
PAPER = {"channels": [128, 256, 256, 256], "blocks": 2, "attention": [16]}


def experiment(
    root: str, seed: int, workers: int, steps: int, batch: int = BATCH, network: dict = SMALL
) -> Experiment:
    one = {"workers": workers, "cpus": 1}
    return Experiment(
        select="test",
        dataset={"name": "cifar100", "imbalance_factor": 100, "root": root},
        generator={**network, "steps": steps, "batch_size": batch, "seed": seed},
        generation={"per_class": 38, "sampler": "dpmsolver++", "steps": 5, "guidance": 1.5, "seed": seed},
        resources={"generator": one, "images": one},
    )


def built(stage: pipeline.Stage, store: Store) -> Artifact:
    for each in stage.walk():
        if store.find(each) is None:
            build.build_one(each, store)
    return store.find(stage)


def rates_apart(trainings: list[pipeline.Stage], store: Store, batch: int, first: int) -> list[float]:
    """Of trainings at once, whose inputs they share."""
    for needed in trainings[0].inputs.values():
        built(needed, store)
    with ThreadPoolExecutor(len(trainings)) as pool:
        return [training_rate(a, batch, first) for a in pool.map(lambda t: built(t, store), trainings)]


def training_rate(artifact: Artifact, batch: int, first: int) -> float:
    from diffult_ray import files

    rows = files.read_json(artifact.folder / "history.json")
    start = next(r for r in rows if r["step"] * batch >= first)
    return batch * (rows[-1]["step"] - start["step"]) / (rows[-1]["seconds"] - start["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["training", "generation"])
    parser.add_argument("--batch", type=int, default=BATCH, help="of the generator's training")
    parser.add_argument("--paper", action="store_true", help="the paper's U-Net")
    parser.add_argument("--steps", type=int, help="of the generator's training")
    parser.add_argument("--apart", action="store_true", help="also two trainings apart")
    given = parser.parse_args()
    batch, network = given.batch, PAPER if given.paper else SMALL
    steps = 2 if given.only == "generation" else given.steps or IMAGES // batch
    folder = Path(tempfile.mkdtemp(prefix="sc-"))
    os.environ["RAY_TMPDIR"] = str(folder / "ray")
    os.environ.pop("RAY_ADDRESS", None)
    training = "generator training" + (f" of batch {batch}" if batch != BATCH else "")
    training += ", the paper's U-Net" if given.paper else ""
    rates: dict[str, dict[int, list[float]]] = {training: {}, "generation": {}}
    apart: list[list[float]] = []
    first = min(FIRST, steps * batch // 7)
    try:
        cluster.connect("local")
        for turn in range(given.repeats):
            for workers in (1, 2):
                store = Store(folder / f"{turn}-{workers}")
                e = experiment(given.root, turn, workers, steps, batch, network)
                trained = built(pipeline.generator(e), store)
                if given.only != "generation":
                    rates[training].setdefault(workers, []).append(training_rate(trained, batch, first))
                if given.only != "training":
                    made = built(pipeline.images(e), store)
                    rates["generation"].setdefault(workers, []).append(made.summary["images_per_second"])
            if given.apart and given.only != "generation":
                halves = [
                    pipeline.generator(experiment(given.root, seed, 1, steps, batch // 2, network))
                    for seed in (turn, turn + given.repeats)
                ]
                found = rates_apart(halves, Store(folder / f"{turn}-apart"), batch // 2, first // 2)
                apart.append([rate / rates[training][1][-1] for rate in found])
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)
    for what, found in rates.items():
        if not found:
            continue
        beside = {}
        if what == training and apart:
            beside["apart"] = summary([sum(each) for each in apart])
            beside["apart_slower"] = summary([2 * min(each) for each in apart])
        tell(
            f"{what}, two workers against one", packages=("ray", "torch"),
            images_per_second={str(w): summary(r, 1) for w, r in found.items()},
            ratio=summary([b / a for a, b in zip(found[1], found[2], strict=True)]), **beside,
        )


if __name__ == "__main__":
    main()
