"""The report's figures: each is drawn from a sweep's results and says in its caption what was compared."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray import summary
from diffult_ray.statistics import Claim, Point, claims
from diffult_ray.summary import METHOD, Cell, Estimate, ReportData, number, setting, settings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DPI = 144
BLUE, GREY, INK = "#0072B2", "#7f7f7f", "#222222"
PREFERRED_PAIR = ("classifier.synthetic_weight", "filter.threshold")
BANDS = ("real", "ID", "AID", "OOD")
GALLERY_CLASSES = 20
NAMED_CLASSES = 30  # more do not fit under an axis
NEIGHBOURS = 9  # classes whose mean is drawn, of so many that single ones scatter
OTHERS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # beside BLUE, of Okabe and Ito
MARKERS = "^vDPX"
NUMBERED = 30, 20  # rows and columns of a heat map; of more, each some are named, and no number is written


@dataclass(frozen=True)
class Picture:
    """A figure of the report. `png` is None where there is something to say and nothing to draw."""

    name: str
    title: str
    caption: str
    alt: str = ""
    png: bytes | None = None


def pictures(data: ReportData) -> list[Picture]:
    """Every figure that the results allow, in the order of the report."""
    found = [*quality_figures(data), heat_map(data), per_class(data), gallery(data)]
    return [p for p in found if p is not None]


def _png(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """Names are text: a dollar sign in one is no formula, and a missing glyph no reason to warn."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _done(data: ReportData) -> pd.DataFrame:
    """DiffuLT's finished trials."""
    return data.results[(data.results["status"] == "done") & (data.results["method"] == METHOD)]


def _frame(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


# --- accuracy against FID and IS --------------------------------------------------------------


MEASURES = {
    "fid": ("FID", "lower is better: the paper's claim is a negative coefficient"),
    "inception_score": ("Inception score", "higher is better: the paper's claim is a positive coefficient"),
}


def quality_figures(data: ReportData) -> Iterator[Picture]:
    """Accuracy against FID and IS, a figure for each quality network."""
    return (_quality_figure(data, claim) for claim in claims(data))


def _quality_figure(data: ReportData, found: Claim) -> Picture:
    network, points = found.network, found.points
    name, claim = MEASURES[found.measure]
    at = settings(found.fixed, data.keys, equals=" = ")
    trials = f"the trials at {at}" if at else "the trials that use it"
    many = (
        f"One point a generator, measured with the {network} network; accuracy is the mean over {trials}, "
        f"bars are their sample deviation. {_coefficients(found)}. For {name}, {claim}."
    )
    one = (
        f"One generator, of {name} {number(points[0].quality, 2)} with the {network} network; "
        f"{number(points[0].accuracy.mean)} % is the mean over {trials}. {_coefficients(found)}."
    )
    title = f"Accuracy against {name} ({network} network)"
    return Picture(
        name=f"accuracy_{found.measure}_{re.sub('[^A-Za-z0-9]+', '_', network)}",
        title=title,
        caption=many if len(points) > 1 else one,
        alt=f"{title}: " + "; ".join(
            f"{p.label or 'generator'}: {number(p.quality, 2)}, {number(p.accuracy.mean)} %" for p in points
        ),
        png=_png(lambda figure: _scatter(figure, points, name), (5.6, 3.8)) if len(points) > 1 else None,
    )


def _coefficients(found: Claim) -> str:
    """Generators that differ in seeds only are no independent evidence, so their means are told as well."""
    if found.over_settings is None:
        return found.over_generators.text
    return f"Over generators: {found.over_generators.text}. Over settings, as means of their seeds: " \
           f"{found.over_settings.text}"


def _scatter(figure: Figure, points: Sequence[Point], name: str) -> None:
    axes = _frame(figure.subplots())
    for p in points:
        bar = p.accuracy.deviation
        axes.errorbar(p.quality, p.accuracy.mean, yerr=bar, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    middle = (min(p.quality for p in points) + max(p.quality for p in points)) / 2
    firsts = {p.label: p for p in reversed(points)}  # seeds of one setting have one name
    for p in firsts.values():
        left = p.quality > middle
        axes.annotate(
            p.label, (p.quality, p.accuracy.mean), xytext=(-7 if left else 7, 5),
            textcoords="offset points", ha="right" if left else "left", fontsize=8, color=INK,
        )
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(name)
    axes.set_ylabel("test accuracy, %")


# --- two searched keys ------------------------------------------------------------------------


def heat_map(data: ReportData) -> Picture | None:
    """Accuracy over two numeric searched keys: weight and threshold, else the first two that cross."""
    rows = _done(data)
    for pair in _pairs(data, rows):
        fixed, taken = summary.like_with_like(
            rows, [k for k in data.keys if k not in pair], pair, summary.chosen(data)
        )
        axes = [sorted({summary.plain(v) for v in taken[k]} - {None}) for k in pair]
        filled = len(summary.points_of(taken, pair))
        if min(map(len, axes)) > 1 and 2 * filled >= len(axes[0]) * len(axes[1]):
            return _heat_map(data, pair, axes, fixed, taken)
    return None


def _pairs(data: ReportData, rows: pd.DataFrame) -> list[tuple[str, str]]:
    numeric = [k for k in data.keys if _is_numeric(rows[k])]
    pairs = list(combinations(numeric, 2))
    return sorted(pairs, key=lambda pair: set(pair) != set(PREFERRED_PAIR))


def _is_numeric(column: pd.Series) -> bool:
    values = [v for v in map(summary.plain, column) if v is not None]
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _heat_map(
    data: ReportData,
    pair: tuple[str, str],
    axes: list[list[float]],
    fixed: dict[str, Any],
    rows: pd.DataFrame,
) -> Picture:
    grid = _grid(rows, pair, axes)
    names = [summary.labels(data.keys)[k] for k in pair]
    ticks = [[setting(k, v) for v in values] for k, values in zip(pair, axes, strict=True)]
    title = f"Accuracy over {names[0]} and {names[1]}"
    at = settings(fixed, data.keys, equals=" = ")
    told = (
        f"{names[0]} {ticks[0][i]}, {names[1]} {ticks[1][j]}: {number(e.mean)} %"
        for i, row in enumerate(grid) for j, e in enumerate(row) if e.n
    )
    return Picture(
        name="heat_map",
        title=title,
        caption="Mean test accuracy in % over seeds"
        + (", their number in parentheses" if max(_every(ticks)) == 1 else "")
        + (f", at {at}." if at else "."),
        alt=f"{title}. " + "; ".join(told),
        png=_png(
            lambda figure: _draw_heat_map(figure, grid, names, ticks),
            (2.0 + 0.95 * min(NUMBERED[1], len(axes[1])), 1.3 + 0.62 * min(NUMBERED[0], len(axes[0]))),
        ),
    )


def _every(ticks: list[list[str]]) -> list[int]:
    """Of rows and of columns, one of how many is named."""
    return [math.ceil(len(values) / most) for values, most in zip(ticks, NUMBERED, strict=True)]


def _grid(rows: pd.DataFrame, pair: Sequence[str], axes: list[list[float]]) -> list[list[Estimate]]:
    accuracy: dict[tuple[Any, Any], list[Any]] = {}
    for a, b, value in zip(*(rows[k] for k in (*pair, "accuracy")), strict=True):
        accuracy.setdefault((summary.plain(a), summary.plain(b)), []).append(value)
    return [[summary.estimate(accuracy.get((a, b), [])) for b in axes[1]] for a in axes[0]]


def _draw_heat_map(
    figure: Figure, grid: list[list[Estimate]], names: list[str], ticks: list[list[str]]
) -> None:
    means = np.array([[math.nan if e.mean is None else e.mean for e in row] for row in grid])
    axes = figure.subplots()
    image = axes.imshow(means, cmap="viridis", aspect="auto")
    every = _every(ticks)
    axes.set_yticks(range(0, len(ticks[0]), every[0]), ticks[0][:: every[0]])
    axes.set_xticks(range(0, len(ticks[1]), every[1]), ticks[1][:: every[1]])
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    for i, j in np.argwhere(~np.isnan(means)) if max(every) == 1 else ():
        ink = "black" if image.norm(means[i, j]) > 0.55 else "white"
        text = f"{means[i, j]:.1f} ({grid[i][j].n})"
        axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, label="test accuracy, %")


# --- classes ----------------------------------------------------------------------------------


def per_class(data: ReportData) -> Picture | None:
    """Each class's accuracy, of the baseline and of the selected cell, over its number of images.

    Between them the generator's FID of the class, where there are images enough for one. Without a
    selected cell, the first cell of each method.
    """
    cell = summary.chosen(data)
    lines = [(c.name, c.per_class(len(data.class_names))) for c in _beside(cell, data)]
    lines = [(name, values) for name, values in lines if not np.isnan(values).all()]
    if not lines:
        return None
    order = np.argsort(-np.array(data.class_counts), kind="stable")
    *most, last = (name for name, _ in lines)
    named = f"{', '.join(most)} and {last}" if most else last
    caption = f"Mean test accuracy over seeds of {named}; below, the training images of each class."
    if len(order) > NAMED_CLASSES:
        caption += f" Lines: the mean of {NEIGHBOURS} classes of about as many images."
    fids, height = None, 4.4
    if cell is not None and not np.isnan(found := cell.per_class(len(order), "per_class_fid")).all():
        fids, height = found, 5.8
        network = " and ".join(cell.networks)
        caption += f" Between them, the FID of each class's generated images, by the {network} network."
    return Picture(
        name="per_class",
        title="Accuracy by class",
        caption=caption,
        alt="Accuracy by class. " + "; ".join(_told(data, lines, fids, c) for c in order),
        png=_png(lambda figure: _draw_classes(figure, data, lines, fids, order), (7.2, height)),
    )


def _beside(cell: Cell | None, data: ReportData) -> list[Cell]:
    """The selected cell after its baseline, or the first cell of each of a few methods, `ce` first."""
    reference = summary.reference_of(cell, data)
    if cell is not None:
        return [cell] if reference is None else [reference, cell]
    first: dict[str, Cell] = {} if reference is None else {reference.name: reference}
    for other in summary.baselines_of(None, data):
        first.setdefault(other.name, other)
    return list(first.values())[: 1 + len(OTHERS)]


def _told(
    data: ReportData, lines: Sequence[tuple[str, np.ndarray]], fids: np.ndarray | None, c: int
) -> str:
    measured = ", ".join(f"{name} {number(values[c])} %" for name, values in lines)
    fid = "" if fids is None else f", FID {number(fids[c], 2)}"
    return f"{data.class_names[c]} ({data.class_counts[c]} images): {measured}{fid}"


def _draw_classes(
    figure: Figure,
    data: ReportData,
    lines: Sequence[tuple[str, np.ndarray]],
    fids: np.ndarray | None,
    order: np.ndarray,
) -> None:
    ratios = (2, 1) if fids is None else (2, 1, 1)
    top, *between, bottom = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
    places, size = np.arange(len(order)), 6.0 if len(order) <= NAMED_CLASSES else 2.5
    _frame(top)
    others = zip(OTHERS, MARKERS, strict=True)
    for place, (name, values) in enumerate(lines):
        color, marker = (BLUE, "o") if name == METHOD else (GREY, "s") if place == 0 else next(others)
        style = {"marker": marker, "color": color, "markersize": size, "linestyle": "none", "mew": 0}
        if len(order) <= NAMED_CLASSES:
            top.plot(places, values[order], label=name, **style)
        else:
            top.plot(places, values[order], alpha=0.3, **style)
            top.plot(places, _smooth(values[order]), color=color, linewidth=1.6, label=name)
    top.set_ylabel("test accuracy, %")
    top.legend(loc="lower left", frameon=True, framealpha=0.9)
    for axes in between:
        _frame(axes).plot(places, fids[order], "o", color=BLUE, markersize=size)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("FID")
    counts = np.array(data.class_counts)[order]
    _frame(bottom).bar(places, counts, color="#c9c9c9")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter(lambda count, _: f"{count:g}")  # powers would be formulas
    bottom.yaxis.set_minor_formatter(lambda count, _: "")
    bottom.set_ylim(bottom=0.7)
    bottom.set_ylabel("training images")
    _name_classes(bottom, data, order, counts)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the known among each value and its neighbours, fewer of them at the ends.

    >>> _smooth(np.array([0.0] * 9 + [9.0])).round(1).tolist()[-6:]
    [0.0, 1.0, 1.1, 1.3, 1.5, 1.8]
    """
    import pandas as pd

    return pd.Series(values).rolling(NEIGHBOURS, center=True, min_periods=1).mean().to_numpy()


def _name_classes(axes: Any, data: ReportData, order: np.ndarray, counts: np.ndarray) -> None:
    if len(order) > NAMED_CLASSES:
        axes.set_xlabel(f"{len(order)} classes, by their number of training images")
        return
    for place, count in enumerate(counts):
        axes.annotate(
            str(count), (place, max(count, 0.7)), xytext=(0, 1), textcoords="offset points",
            ha="center", fontsize=7, color=INK,
        )
    names = [_short(data.class_names[c], 14) for c in order]
    tilted = max(map(len, names)) * len(names) > 70
    rotation, ha = (40, "right") if tilted else (0, "center")
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha=ha)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


# --- images -----------------------------------------------------------------------------------


def gallery(data: ReportData) -> Picture | None:
    """Real images of each class beside generated ones by band, head classes first."""
    classes = sorted((c for c in data.gallery if _has_images(data, c)), key=lambda c: -data.class_counts[c])
    if not classes:
        return None
    shown = [classes[i] for i in _spread(len(classes), GALLERY_CLASSES)]
    cell: Cell | None = summary.chosen(data)
    few = f" {len(shown)} of {len(classes)} classes, from head to tail." if len(shown) < len(classes) else ""
    of = f" of the selected cell ({settings(cell.values, data.keys) or METHOD})" if cell else ""
    return Picture(
        name="gallery",
        title="Real and generated images",
        caption=f"Training images of each class, and generated ones{of} by band, their distance to the class "
        f"in units of its d_f: ID up to 1, AID up to 2, OOD beyond. A gap: no image in that band.{few}",
        alt="Rows are classes, from the most training images to the fewest: "
        + ", ".join(data.class_names[c] for c in shown) + ". Columns are real, ID, AID and OOD images.",
        png=_draw_gallery(data, shown),
    )


def _has_images(data: ReportData, c: int) -> bool:
    return any(len(images) for images in data.gallery[c].values())


def _spread(size: int, most: int) -> list[int]:
    """At most that many places, evenly from first to last."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(size, most))})


def _draw_gallery(data: ReportData, classes: Sequence[int]) -> bytes:
    bands = [b for b in BANDS if any(len(data.gallery[c].get(b, ())) for c in classes)]
    widths = {b: max(len(data.gallery[c].get(b, ())) for c in classes) for b in bands}
    side = max(max(images.shape[1:3]) for c in classes for images in data.gallery[c].values())
    gap = max(1, side // 8)
    strips = [_strip(data, classes, b, widths[b], side, gap) for b in bands]
    thumbnails, rows = sum(widths.values()), len(classes)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(bands), squeeze=False, width_ratios=[s.shape[1] for s in strips])[0]
        for axes, band, strip in zip(panels, bands, strips, strict=True):
            axes.imshow(strip, interpolation="nearest")
            axes.set_title(band, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        middles = [gap + side / 2 - 0.5 + i * (side + gap) for i in range(rows)]
        names = [f"{_short(data.class_names[c], 18)} ({data.class_counts[c]})" for c in classes]
        panels[0].set_yticks(middles, names)
        panels[0].tick_params(length=0)

    return _png(draw, (1.4 + 0.34 * thumbnails, 0.5 + 0.36 * rows))


def _strip(
    data: ReportData, classes: Sequence[int], band: str, width: int, side: int, gap: int
) -> np.ndarray:
    """[H, W, 3] uint8: a row of thumbnails for each class on white."""
    step = side + gap
    canvas = np.full((gap + step * len(classes), gap + step * width, 3), 255, dtype=np.uint8)
    for row, c in enumerate(classes):
        for place, image in enumerate(data.gallery[c].get(band, ())):
            pixels = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
            y, x = gap + row * step, gap + place * step
            canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return canvas
