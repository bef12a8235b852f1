"""What a sweep's numbers amount to: correlations over generators, and all statistics as one JSON.

Means, deviations, intervals and paired differences are `summary`'s; here they are written down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray import files, summary
from diffult_ray.summary import METHOD, Estimate, ReportData, finite, number, settings

if TYPE_CHECKING:
    import pandas as pd

FEWEST, FEWEST_FOR_INTERVAL = 3, 4  # points of a coefficient; Fisher's z has a deviation of 1 / sqrt(n - 3)
QUALITY = ("fid", "inception_score")
EXPECTED_NETWORK = "inception"  # of what others report
WRITTEN = (
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few",
    "validation_accuracy", "nll", "ece", "steps", "train_images", "generated", "kept",
    "p_id", "p_aid", "p_ood", "memorised", "memorised_expected", "agreement",
    *QUALITY, "kid", "precision", "recall",
)

Interval = tuple[float, float]


# --- correlation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's rho over n points, None where they are not defined.

    The 95% intervals take the points for independent: of r by Fisher's z (scipy.stats.pearsonr); of
    rho by the same transform with the variance (1 + rho^2 / 2) / (n - 3) of Bonett and Wright
    ("Sample size requirements for estimating Pearson, Kendall and Spearman correlations",
    Psychometrika 65, 2000). None below four points, or where all points lie on a line.
    """

    n: int
    pearson: float | None = None
    pearson_interval: Interval | None = None
    spearman: float | None = None
    spearman_interval: Interval | None = None

    @property
    def text(self) -> str:
        """In words, with n.

        >>> Correlation(2).text
        'n = 2: no coefficient'
        """
        if self.pearson is None or self.spearman is None:
            alike = ", all alike on one axis" if self.n >= FEWEST else ""
            return f"n = {self.n}{alike}: no coefficient"
        r = _with_interval("Pearson's r", self.pearson, self.pearson_interval)
        rho = _with_interval("Spearman's rho", self.spearman, self.spearman_interval)
        few = f", too few for an interval (it takes {FEWEST_FOR_INTERVAL})"
        return f"{r}, {rho}, n = {self.n}{few if self.n < FEWEST_FOR_INTERVAL else ''}"


def _with_interval(name: str, value: float, interval: Interval | None) -> str:
    between = f" (95% {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"{name} = {value:.2f}{between}"


def correlation(pairs: Sequence[tuple[Any, Any]]) -> Correlation:
    """Of the pairs of which both numbers are known."""
    known = [(finite(a), finite(b)) for a, b in pairs]
    points = np.array([p for p in known if None not in p], dtype=float).reshape(-1, 2)
    n = len(points)
    if n < FEWEST or (np.ptp(points, axis=0) == 0).any():
        return Correlation(n)
    from scipy.stats import pearsonr, spearmanr

    x, y = points.T
    found, rho = pearsonr(x, y), float(spearmanr(x, y)[0])
    r = float(found[0])
    if n < FEWEST_FOR_INTERVAL:
        return Correlation(n, r, None, rho, None)
    fisher = None if abs(r) > 1 - 1e-12 else tuple(float(b) for b in found.confidence_interval(0.95))
    return Correlation(n, r, fisher, rho, _of_rank(rho, n))


def _of_rank(rho: float, n: int) -> Interval | None:
    if abs(rho) > 1 - 1e-12:
        return None
    from scipy.stats import norm

    half = float(norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(rho)
    return math.tanh(z - half), math.tanh(z + half)


# --- generators -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One generator: its quality, and the accuracy of the classifiers that learnt from it."""

    label: str
    quality: float
    accuracy: Estimate


@dataclass(frozen=True)
class Claim:
    """Generator quality against accuracy, as one network measures it, at one setting of the other keys.

    Attributes:
        over_settings: over the means of the generators that differ in seeds only, where there are such:
            they are not independent draws of a setting, so the interval over generators is too narrow.
    """

    measure: str
    network: str
    fixed: dict[str, Any]
    points: list[Point]
    over_generators: Correlation
    over_settings: Correlation | None


def claims(data: ReportData) -> Iterator[Claim]:
    """FID and IS against accuracy, one for each quality network: their scales are not one scale."""
    done = data.results[(data.results["status"] == "done") & (data.results["method"] == METHOD)]
    for measure in QUALITY:
        known = done[done[measure].map(finite).notna()]
        for rows in summary.points_of(known, ["quality_network"]):
            network = summary.plain(rows.iloc[0]["quality_network"]) or "unknown"
            fixed, points = generator_points(data, measure, rows)
            means = _means(points)
            yield Claim(
                measure, str(network), fixed, points,
                correlation([(p.quality, p.accuracy.mean) for p in points]),
                correlation(means) if len(means) < len(points) else None,
            )


def _means(points: Sequence[Point]) -> list[tuple[float | None, float | None]]:
    """Mean quality and mean accuracy of the points of one label."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.label, []).append(point)
    mean = summary.estimate
    return [
        (mean(p.quality for p in group).mean, mean(p.accuracy.mean for p in group).mean)
        for group in groups.values()
    ]


def generator_points(
    data: ReportData, measure: str, rows: pd.DataFrame
) -> tuple[dict[str, Any], list[Point]]:
    """The generators at one setting of all the keys that do not make images.

    How a generator is sampled changes its FID, so each sampling is a point of its own.

    Returns:
        the setting that is compared at, and a point for each generator there.
    """
    makes = [k for k in data.keys if _makes_images(k)]
    identity = ["generator", *(k for k in makes if k.startswith("generation."))]
    fixed, rows = summary.like_with_like(
        rows, [k for k in data.keys if k not in makes], identity, summary.chosen(data)
    )
    groups = summary.points_of(rows, identity)
    varied = [k for k in makes if len({repr(summary.plain(g.iloc[0][k])) for g in groups}) > 1]
    points = []
    for group in groups:
        label = settings({k: summary.plain(group.iloc[0][k]) for k in varied}, data.keys)
        quality = summary.estimate(group[measure]).mean
        points.append(Point(label, float(quality or 0.0), summary.estimate(group["accuracy"])))
    return fixed, points


def _makes_images(key: str) -> bool:
    return key.startswith(("generator.", "generation.")) and key != "generation.per_class"


# --- beside what was expected -----------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """An expected number and ours of one cell; no cell where the sweep has none for it."""

    name: str
    measure: str
    ours: Estimate | None
    theirs: float
    standing: str
    source: str
    networks: tuple[str, ...] = ()  # that measured ours, where it is one of `QUALITY`

    @property
    def compares(self) -> bool:
        """Expected FID and IS are by Inception; those of another network are on another scale."""
        return self.measure not in QUALITY or set(self.networks) <= {EXPECTED_NETWORK}


def beside(data: ReportData) -> list[Beside]:
    """A row for each expected number and each cell that it is about, shares in percent."""
    cells = {c.id: c for c in summary.cells(data)}
    rows = []
    for row, ids in data.expected:
        where = row.where or {}
        keys = [k for k in where if k != "method"]
        named = settings({k: where[k] for k in keys}, keys) if keys else ""
        name = row.label or " ".join(filter(None, [where.get("method", METHOD), named]))
        found = [cells[i] for i in ids if i in cells]
        for cell in found or [None]:
            own = f": {settings(cell.values, data.keys)}" if cell and len(found) > 1 else ""
            ours = None if cell is None else _in_percent(row.measure, cell.over_seeds(row.measure))
            networks = cell.networks if cell is not None and row.measure in QUALITY else ()
            rows.append(
                Beside(name + own, row.measure, ours, row.value, row.standing, row.source, networks)
            )
    return rows


def _in_percent(measure: str, e: Estimate) -> Estimate:
    if not measure.startswith("p_") or e.mean is None:
        return e
    return Estimate(100 * e.mean, None if e.deviation is None else 100 * e.deviation, e.n)


def shown(measure: str, value: float | None) -> str:
    """A measure's number with the decimals that it deserves."""
    digits = 2 if measure in QUALITY else 0 if measure in ("kept", "generated") else 1
    return number(value, digits)


# --- as a file --------------------------------------------------------------------------------


def write(data: ReportData, folder: Path) -> None:
    """`statistics.json`: every estimate with mean, deviation, n and 95% interval; None is not known."""
    files.write_json(folder / "statistics.json", {
        "sweep": data.name,
        "selection": data.select,
        "selected": summary.selected(data),
        "cells": [
            {
                "cell": c.id, "method": c.method, "values": _plain(c.values), "failed": c.failed,
                "measures": {m: _told(c.over_seeds(m)) for m in WRITTEN if c.over_seeds(m).n},
            }
            for c in summary.cells(data)
        ],
        "differences": list(_differences(data)),
        "correlations": [_claim(c) for c in claims(data)],
        "differs_from_expected": list(data.differs),
        "expected": [
            {
                "name": b.name, "measure": b.measure, "ours": None if b.ours is None else _told(b.ours),
                "theirs": b.theirs, "standing": b.standing, "source": b.source,
                "networks": list(b.networks), "compares": b.compares,
            }
            for b in beside(data)
        ],
    })


def _differences(data: ReportData) -> Iterator[dict[str, Any]]:
    """Accuracy of every cell less each baseline's at its settings, over the seeds that both have."""
    for cell in summary.cells(data):
        for baseline in summary.baselines_of(cell, data):
            if baseline.id != cell.id:
                e = summary.paired(cell, baseline)
                ids = {"cell": cell.id, "baseline": baseline.id, "baseline_method": baseline.method}
                yield {**ids, "measure": "accuracy", **_told(e)}


def _claim(c: Claim) -> dict[str, Any]:
    over = {"generators": c.over_generators, "settings": c.over_settings}
    return {
        "measure": c.measure,
        "network": c.network,
        "at": _plain(c.fixed),
        **{f"over_{name}": None if found is None else {
            "n": found.n,
            "pearson": found.pearson, "pearson_interval": found.pearson_interval,
            "spearman": found.spearman, "spearman_interval": found.spearman_interval,
        } for name, found in over.items()},
        "points": [
            {"label": p.label, c.measure: p.quality, "accuracy": _told(p.accuracy)} for p in c.points
        ],
    }


def _told(e: Estimate) -> dict[str, Any]:
    return {"mean": e.mean, "deviation": e.deviation, "n": e.n, "interval": e.interval}


def _plain(values: Any) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: "inf" if v == math.inf else v for k, v in values.items()}
