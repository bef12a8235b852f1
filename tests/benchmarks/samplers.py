"""FID against seconds of every sampler, on the same weights: those of a stored generator.

    python tests/benchmarks/samplers.py --storage DIR [--sweep digits] [--images 1000] [--seeds 3]
                                        [--figure FILE.png] [key=value ...]

DIR holds a sweep that has been run; the sweep's last generator and its reference network are used. One
JSON line a sampler: FID over the seeds, seconds an image, and how many times fewer seconds than ancestral
sampling with every timestep. All in one process, the samplers in turns. `chosen` marks the cheapest
sampler whose FID is within 2% of the best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import summary, tell

from diffult_ray import config
from diffult_ray.method.quality import balanced_counts, frechet_distance, moments_of
from diffult_ray.pipeline import Stage
from diffult_ray.plan import make_plan
from diffult_ray.seeds import stream
from diffult_ray.stages.networks import load_network
from diffult_ray.stages.quality import Real
from diffult_ray.stages.sampler import Sampler
from diffult_ray.store import Store

CASES = (
    ("ddpm", 1000), ("ddim", 100), ("ddim", 50), ("dpmsolver++", 30), ("dpmsolver++", 20),
    ("dpmsolver++", 12), ("dpmsolver++", 10), ("dpmsolver++", 6), ("heun", 18), ("heun", 10), ("heun", 6),
)
WITHIN = 1.02


def stages(sweep: str, overrides: list[str]) -> dict[str, Stage]:
    """The stages before the trial with the longest generator."""
    plan = make_plan(config.load(sweep, overrides))
    trials = [{s.name: s for s in t.upstream} for t in plan.trials]
    return max((t for t in trials if "quality" in t), key=lambda t: t["generator"].config["steps"])


def rows(images: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and seeds of as many images of every class."""
    labels = np.repeat(np.arange(classes), balanced_counts(images, classes))
    return labels, np.array([stream(seed, "image", int(c), i) for i, c in enumerate(labels)])


def measure(
    found: dict[str, Stage], store: Store, images: int, seeds: int, guidance: float
) -> dict[Any, Any]:
    """(sampler, steps) -> FIDs and seconds an image, one a seed."""
    folder, device = store.folder(found["generator"]), torch.device("cpu")
    network = load_network("reference", store.folder(found["reference"]), device)
    real = Real(store.folder(found["reference"]), store.folder(found["split"]))
    samplers = {
        case: Sampler(folder, {"sampler": case[0], "steps": case[1], "guidance": guidance}, device)
        for case in CASES
    }
    classes = int(real.labels.max()) + 1
    taken: dict[Any, Any] = {case: {"fid": [], "seconds": []} for case in CASES}
    for seed in range(seeds):
        labels, own = rows(images, classes, seed)
        for case, sampler in samplers.items():
            start = time.perf_counter()
            made = sampler(labels, own)
            taken[case]["seconds"].append((time.perf_counter() - start) / images)
            taken[case]["fid"].append(frechet_distance(moments_of(network(made)[0].numpy()), real.moments))
    return taken


def chosen(taken: dict[Any, Any]) -> Any:
    """The cheapest within 2% of the best mean FID."""
    fids = {case: statistics.mean(values["fid"]) for case, values in taken.items()}
    good = [case for case, fid in fids.items() if fid <= WITHIN * min(fids.values())]
    return min(good, key=lambda case: statistics.median(taken[case]["seconds"]))


def draw(taken: dict[Any, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for name, _ in taken):
        own = {steps: values for (sampler, steps), values in taken.items() if sampler == name}
        milliseconds = [1000 * statistics.median(values["seconds"]) for values in own.values()]
        fids = [statistics.mean(values["fid"]) for values in own.values()]
        spread = [statistics.stdev(values["fid"]) for values in own.values()]
        axes.errorbar(milliseconds, fids, yerr=spread, fmt="o-", linewidth=1, capsize=2, label=name)
        for steps, x, y in zip(own, milliseconds, fids, strict=True):
            axes.annotate(str(steps), (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds an image", ylabel="FID (reference network)")
    axes.legend(title="sampler, by its steps")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--sweep", default="digits")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    found = stages(given.sweep, given.overrides)
    taken = measure(found, Store(given.storage), given.images, given.seeds, given.guidance)
    slowest, best = taken[CASES[0]]["seconds"], chosen(taken)
    for case, values in taken.items():
        quicker = [a / b for a, b in zip(slowest, values["seconds"], strict=True)]
        tell(
            f"sampler, guidance {given.guidance:g}", packages=("torch", "diffusers"),
            sampler=case[0], steps=case[1], images=given.images, fid=summary(values["fid"]),
            milliseconds_an_image=summary([1000 * s for s in values["seconds"]]),
            times_ddpm=summary(quicker, 1), chosen=case == best,
        )
    if given.figure:
        draw(taken, given.figure)


if __name__ == "__main__":
    main()
