"""What a sweep's data set is: counts, shot groups, sizes, where it lies, whether its files are whole.

    python -m diffult_ray.data                                # the shipped sweep `digits`
    python -m diffult_ray.data my.yaml dataset.root=/data/birds --out birds.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffult_ray import config
from diffult_ray.config import OFFICIAL, Dataset
from diffult_ray.data import Split, make_split
from diffult_ray.data.pixels import sizes
from diffult_ray.data.source import NAMED, Faults, some
from diffult_ray.data.sources import open_source
from diffult_ray.errors import BadInput, Refused
from diffult_ray.method.classification import SHOT_GROUPS, shot_groups

BAR, ROWS = 50, 24  # characters of the longest bar, bars of a histogram
COLOURS = {"many": "#1b6ca8", "medium": "#e08e45", "few": "#b23a48"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print and draw a sweep's data sets; returns the exit code, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        _main(arguments)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m diffult_ray.data", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", default="digits", help="a file or the name of a shipped sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys to override")
    parser.add_argument("--overlay", metavar="NAME|FILE", help="another scale or set, such as smoke")
    parser.add_argument("--storage", help="folder of all results (DIFFULT_STORAGE, else ~/diffult)")
    parser.add_argument("--out", help="the figure (default: data/<sweep name>.png in the storage folder)")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    name, overrides = arguments.sweep, list(arguments.overrides)
    if "=" in name and not Path(name).exists():
        name, overrides = "digits", [name, *overrides]
    sweep = config.load(name, overrides, arguments.overlay)
    datasets = list(dict.fromkeys(e.dataset for e in config.experiments(sweep)))
    splits = [make_split(dataset) for dataset in datasets]
    for dataset, split in zip(datasets, splits, strict=True):
        print("\n".join(describe(dataset, split)), end="\n\n")
    print(f"figure: {draw(datasets, splits, _figure(arguments, sweep.name))}")


def _figure(arguments: argparse.Namespace, name: str) -> Path:
    if arguments.out:
        return Path(arguments.out).expanduser().absolute()
    storage = arguments.storage or os.environ.get("DIFFULT_STORAGE") or "~/diffult"
    return Path(storage).expanduser().absolute() / "data" / f"{name}.png"


# --- in words -----------------------------------------------------------------------------------


def describe(dataset: Dataset, split: Split) -> Iterator[str]:
    """Lines on a data set and its split."""
    counts = np.array(split.counts)
    form = "streamed from its files" if split.streamed else "held in memory"
    yield f"{dataset.summary}: {split.num_classes} classes, {form}"
    yield from (f"  {line}" for line in _where(dataset, split))
    yield f"  images     {split.image_size}x{split.image_size}, {_colour(split.channels)}; {_stored(dataset)}"
    yield f"  parts      {_parts(split)}"
    yield f"  counts     {counts.max()} .. {counts.min()} a class, imbalance {counts.max() / counts.min():g}"
    yield f"  shots      {_shots(counts)}"
    yield from (f"  note       {note}" for note in split.facts["notes"])
    yield from _histogram(split.class_names, counts)


def _where(dataset: Dataset, split: Split) -> Iterator[str]:
    yield f"where      {split.facts['root'] or 'inside scikit-learn'}"
    if dataset.name in OFFICIAL:
        yield "checksums  hold: the md5 of every file is the official one"
    else:
        yield f"content    {split.facts['fingerprint']} (a fingerprint; the set has no official checksums)"
    skipped = split.facts["skipped"]
    left_out = f": {some(skipped['first'])}" + (" ..." if skipped["n"] > NAMED else "")
    yield f"skipped    {skipped['n']} faulty images" + (left_out if skipped["n"] else "")


def _colour(channels: int) -> str:
    return "grey" if channels == 1 else "colour"


def _stored(dataset: Dataset) -> str:
    found = sizes(open_source(dataset, Faults(on_error="skip")))
    most = sorted(found, key=found.__getitem__, reverse=True)
    listed = ", ".join(f"{w}x{h}" for w, h in most[:3])
    return f"stored as {listed}" + (f" and {len(most) - 3} other sizes" if len(most) > 3 else "")


def _parts(split: Split) -> str:
    names = ("train", "validation", "test", "balanced")
    return ", ".join(f"{name} {len(getattr(split, name))}" for name in names)


def _shots(counts: np.ndarray) -> str:
    groups = shot_groups(counts.tolist())
    return ", ".join(f"{group} {groups.count(group)} classes" for group in SHOT_GROUPS)


def _histogram(names: Sequence[str], counts: np.ndarray) -> Iterator[str]:
    """One bar a class, or, of many classes, one a run of neighbours in the order of their counts."""
    order = np.argsort(-counts, kind="stable")
    for run in np.array_split(order, min(ROWS, len(order))):
        mean = counts[run].mean()
        label = names[run[0]] if len(run) == 1 else f"{names[run[0]]} .. {names[run[-1]]}"
        bar = "#" * max(1, round(BAR * mean / counts.max()))
        yield f"  {label[:30]:<30} {mean:>8.{int(len(run) > 1)}f} {bar}"


# --- in a picture -------------------------------------------------------------------------------


def draw(datasets: Sequence[Dataset], splits: Sequence[Split], path: Path) -> Path:
    """Training images a class in falling order, coloured by shot group, one panel a data set.

    Raises:
        BadInput: if the figure cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(splits)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(splits), 1, squeeze=False)[:, 0]
    for panel, dataset, split in zip(panels, datasets, splits, strict=True):
        _panel(panel, dataset, split)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        rule = f"is a picture that can be written: {error}"
        raise BadInput(where="--out", rule=rule, value=str(path)) from error
    return path


def _panel(panel, dataset: Dataset, split: Split) -> None:
    counts = np.sort(split.counts)[::-1]
    groups = np.array(shot_groups(counts.tolist()))
    for group in (g for g in SHOT_GROUPS if g in groups):
        mine = np.flatnonzero(groups == group)
        panel.bar(mine, counts[mine], width=1.0, color=COLOURS[group], label=f"{group}: {len(mine)} classes")
    panel.set(title=dataset.summary, xlabel="class, by falling count", ylabel="training images", yscale="log")
    panel.set_xlim(-0.5, len(counts) - 0.5)
    panel.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
