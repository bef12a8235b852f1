"""Loss curves with and without each optimisation, beside what another seed does to them.

    python tests/benchmarks/curves.py --root DIR [--seeds 3] [--stage generator|classifier]
                                      [--only SWITCH ...] [--figure FILE.png]

CIFAR100-LT (imbalance factor 100) in DIR. The generator (a U-Net of 32-64 channels with attention at 16x16
and the regulariser, batch 32) and the classifier (ResNet-32, batch 128), each with what its defaults pick,
and with one switch set otherwise, in a process of its own on all cores; of the two precisions, one is the
processor's default. One JSON line a switch: the root mean square of what it changes in a seed's curve, as a
share of what another seed changes; without dropout, whose luck differs by the way its masks are drawn.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from measure import tell
from ray_share import here

from diffult_ray import build, files, pipeline
from diffult_ray.config import Experiment
from diffult_ray.stages import Order, classifier, generator
from diffult_ray.store import Store

STEPS = {"generator": 150, "classifier": 150}
POINTS = 15
USUAL = "as by default"
SWITCHES = {
    "generator": {
        USUAL: {}, "precision: float32": {"precision": "float32"}, "precision: bf16": {"precision": "bf16"},
        "tuned: false": {"tuned": False}, "keep_memory: false": {"keep_memory": False},
        "accumulate: 2": {"accumulate": 2},
    },
    "classifier": {
        USUAL: {}, "precision: float32": {"precision": "float32"}, "precision: bf16": {"precision": "bf16"},
        "tuned: false": {"tuned": False}, "keep_memory: false": {"keep_memory": False},
    },
}
OF_STAGE = {"precision"}  # the others are of its resources


def experiment(root: str, seed: int, stage: str, switch: dict[str, object]) -> Experiment:
    own = {k: v for k, v in switch.items() if k in OF_STAGE}
    resources = {"cpus": os.cpu_count(), **{k: v for k, v in switch.items() if k not in OF_STAGE}}
    sections = {
        "generator": {"channels": [32, 64], "blocks": 1, "attention": [16], "dropout": 0.0,
                      "steps": STEPS["generator"], "batch_size": 32, "warmup_steps": 50, "seed": seed},
        "classifier": {"steps": STEPS["classifier"], "seed": seed},
    }
    sections[stage] |= own
    return Experiment(
        method="diffult" if stage == "generator" else "ce", select="test",
        dataset={"name": "cifar100", "imbalance_factor": 100, "root": root},
        resources={stage: resources}, **sections,
    )


def curve(root: str, seed: int, stage: str, switch: dict[str, object]) -> list[float]:
    """Mean losses of as many equal parts of the training as there are points."""
    made = getattr(pipeline, stage)(experiment(root, seed, stage, switch))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(generator, "train", here):
        store = Store(folder)
        build.build_one(made.inputs["split"], store)
        order = Order(made.config, {"split": store.folder(made.inputs["split"])}, Path(folder, "out"),
                      Path(folder, "work"))
        order.out.mkdir()
        order.work.mkdir(exist_ok=True)
        {"generator": generator, "classifier": classifier}[stage].build([order], made.resources)
        rows = files.read_json(order.out / "history.json")
    losses, before = np.empty(STEPS[stage]), 0
    for row in rows:  # each is a mean since the one before
        losses[before : row["step"]] = row["loss"]
        before = row["step"]
    return losses.reshape(POINTS, -1).mean(1).tolist()


def root_mean_square(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    return float(np.sqrt(np.mean([(a - b) ** 2 for a, b in pairs])))


def draw(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (stage, curves) in zip(panels, found.items(), strict=True):
        steps = (np.arange(POINTS) + 0.5) * STEPS[stage] / POINTS
        styles = itertools.cycle(["-", "--", ":", "-.", (0, (1, 4))])
        for number, ((name, seeds), style) in enumerate(zip(curves.items(), styles, strict=False)):
            for seed, losses in enumerate(seeds):
                label = name if seed == 0 else None
                axes.plot(steps, losses, linestyle=style, color=f"C{number}", linewidth=1.2, label=label)
        axes.set(title=f"{stage}, {len(seeds)} seeds", xlabel="step", ylabel="training loss")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stage", choices=list(SWITCHES), help="only that one")
    parser.add_argument("--only", nargs="+", metavar="SWITCH", help="such as 'precision: bf16'")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, np.ndarray]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as apart:
        for stage, switches in SWITCHES.items():
            if given.stage not in (None, stage):
                continue
            found[stage] = {
                name: np.array([
                    apart.apply(curve, (given.root, seed, stage, switch))
                    for seed in range(given.seeds)
                ])
                for name, switch in switches.items()
                if name == USUAL or given.only is None or name in given.only
            }
            usual = found[stage][USUAL]
            seeds = root_mean_square(list(itertools.combinations(usual, 2)))
            for name, curves in found[stage].items():
                if name != USUAL:
                    own = root_mean_square(list(zip(usual, curves, strict=True)))
                    tell(f"loss curve of the {stage}, {name}", n=given.seeds, steps=STEPS[stage],
                         change=own, of_another_seed=seeds, share=own / seeds,
                         last_loss=round(statistics.mean(curves[:, -1]), 4))
    if given.figure:
        draw(found, given.figure)


if __name__ == "__main__":
    main()
