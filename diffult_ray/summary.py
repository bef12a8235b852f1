"""What the results of a sweep say: its cells, the selected one, and paired differences to the baselines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffult_ray.config import NAMED, variant

if TYPE_CHECKING:
    import pandas as pd

    from diffult_ray.config import Expected

# What a measure tells of, where that is not the trial: the column that names it.
OWNERS = {
    **dict.fromkeys(
        ("fid", "inception_score", "kid", "precision", "recall", "fid_images", "per_class_fid"), "generator"
    ),
    **dict.fromkeys(("p_id", "p_aid", "p_ood", "memorised", "memorised_expected"), "pool"),
    **dict.fromkeys(("generated", "kept"), "pool"),
}
METHOD = "diffult"  # what is selected; every other method is a baseline


@dataclass
class ReportData:
    """All that a report shows. `results` stays as it is once a cell was asked for.

    `gallery`: class -> 'real' or a band -> [n, H, W] or [n, H, W, 3] uint8.
    """

    name: str
    description: str
    results: pd.DataFrame
    searched: list[str]
    select: Literal["validation", "test"]
    class_names: list[str]
    class_counts: list[int]
    gallery: dict[int, dict[str, np.ndarray]]
    stages: pd.DataFrame
    facts: dict[str, str]
    notes: list[str] = field(default_factory=list)  # what a reader of the measures must know
    expected: list[tuple[Expected, list[str]]] = field(default_factory=list)  # with the cells they are about
    differs: Sequence[str] = ()  # why the results do not compare with what was expected

    @property
    def keys(self) -> list[str]:
        """Searched keys that tell cells of one name apart: seeds do not."""
        return [k for k in self.searched if k.rpartition(".")[2] != "seed" and k not in NAMED]

    @property
    def selection_column(self) -> str:
        return "validation_accuracy" if self.select == "validation" else "accuracy"

    @cached_property
    def _cells(self) -> tuple[Cell, ...]:
        found = []
        for name, trials in self.results.groupby("cell", sort=False):
            first = trials.iloc[0]
            values = {k: plain(first[k]) for k in self.keys}
            found.append(Cell(str(name), str(first["method"]), values, trials))
        return tuple(sorted(found, key=lambda c: c.method == METHOD))


# --- estimates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Mean and sample deviation of n values; None where n is too small to know."""

    mean: float | None
    deviation: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the mean, mean +- t_{0.975, n-1} s / sqrt(n) (Student, "The probable error
        of a mean", Biometrika 6, 1908); None for n < 2."""
        if self.mean is None or self.deviation is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, self.n - 1)) * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def estimate(values: Iterable[Any]) -> Estimate:
    """Of the finite values; what is missing does not count.

    >>> estimate([1.0, 3.0, None])
    Estimate(mean=2.0, deviation=1.4142135623730951, n=2)
    """
    known = np.array([v for v in map(finite, values) if v is not None])
    n = len(known)
    return Estimate(
        mean=float(known.mean()) if n else None,
        deviation=float(known.std(ddof=1)) if n > 1 else None,
        n=n,
    )


def finite(value: Any) -> float | None:
    """A number that is one, or None for what is missing, infinite or no number."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


# --- cells ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cell:
    """The trials that differ in seeds only."""

    id: str
    method: str
    values: Mapping[str, Any]  # searched key -> value, None where the method does not use it
    trials: pd.DataFrame
    _estimates: dict[str, Estimate] = field(default_factory=dict, repr=False)  # by column

    @cached_property
    def name(self) -> str:
        """The method, and whether synthetic images are added to what it is by itself."""
        return variant(self.method, plain(self.trials.iloc[0]["synthetic"]))

    @cached_property
    def done(self) -> pd.DataFrame:
        return self.trials[self.trials["status"] == "done"]

    @property
    def failed(self) -> int:
        return int((self.trials["status"] == "failed").sum())

    def over_seeds(self, column: str) -> Estimate:
        """Of a column of the finished trials; of one that tells of a generator or pool, each counts once."""
        if column not in self._estimates:
            known = column in self.done  # an older table lacks the newer measures
            rows = _each_once(self.done, OWNERS.get(column)) if known else {column: ()}
            self._estimates[column] = estimate(rows[column])
        return self._estimates[column]

    @property
    def networks(self) -> tuple[str, ...]:
        """Those that measured its generators."""
        names = dict.fromkeys(plain(v) for v in self.done["quality_network"])
        return tuple(str(n) for n in names if n is not None)

    def mean(self, column: str) -> float | None:
        return self.over_seeds(column).mean

    def by_seed(self, column: str) -> dict[int, float]:
        """The finished trials' values by seed, averaged where other seeds vary as well."""
        found: dict[int, list[Any]] = {}
        for seed, value in zip(self.done["seed"], self.done[column], strict=True):
            found.setdefault(int(seed), []).append(value)
        means = {seed: estimate(values).mean for seed, values in found.items()}
        return {seed: mean for seed, mean in means.items() if mean is not None}

    def per_class(self, num_classes: int, column: str = "per_class_accuracy") -> np.ndarray:
        """[C] mean of each class, NaN where it is not known."""
        listed = _each_once(self.done, OWNERS.get(column)).get(column, ())
        rows = [np.asarray(r, dtype=float) for r in listed if r is not None]
        rows = [r for r in rows if r.shape == (num_classes,)]
        columns = np.stack(rows, axis=1) if rows else np.empty((num_classes, 0))
        means = [estimate(column).mean for column in columns]
        return np.array([math.nan if m is None else m for m in means])


def _each_once(rows: pd.DataFrame, owner: str | None) -> pd.DataFrame:
    """The first row of each owner; rows whose owner is not known are kept."""
    if owner not in rows:
        return rows
    return rows[rows[owner].isna() | ~rows[owner].duplicated()]


def cells(data: ReportData) -> list[Cell]:
    """Baselines first, then DiffuLT's, each in the order of the sweep."""
    return list(data._cells)


def plain(value: Any) -> Any:
    """A value of the sweep as it was written: lists for arrays, None for what is missing."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if _is_missing(value) else value


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or value != value


# --- selection and comparison -----------------------------------------------------------------


def selected(data: ReportData) -> str | None:
    """The DiffuLT cell that the selection set chooses: the highest mean accuracy over its seeds.

    Only the cells with the most finished seeds compete: a mean over fewer scatters more, and the
    luckiest of them would win. Equal means go to the lower mean nll, then to the earlier cell.
    """
    rivals = contenders(data)
    return min(rivals, key=lambda c: _rank(c, data.selection_column)).id if rivals else None


def contenders(data: ReportData) -> list[Cell]:
    """The DiffuLT cells with the most finished trials that the selection set has judged."""
    column = data.selection_column
    judged = [(c, c.over_seeds(column).n) for c in cells(data) if c.method == METHOD]
    most = max((n for _, n in judged), default=0)
    return [c for c, n in judged if n == most > 0]


def _rank(cell: Cell, column: str) -> tuple[float, float]:
    """The rounding makes equal means equal, whatever the order of their sum."""
    nll = cell.mean("nll")
    return -round(cell.mean(column) or 0.0, 9), math.inf if nll is None else round(nll, 9)


def chosen(data: ReportData) -> Cell | None:
    """The selected cell itself."""
    name = selected(data)
    return next((c for c in cells(data) if c.id == name), None)


def baselines_of(cell: Cell | None, data: ReportData) -> list[Cell]:
    """The baseline cells at a cell's own settings, as far as the baselines use them; all without one."""
    rivals = [c for c in cells(data) if c.method != METHOD]
    return [b for b in rivals if cell is None or _at_settings(b, cell)]


def _at_settings(baseline: Cell, cell: Cell) -> bool:
    used = {k: v for k, v in baseline.values.items() if v is not None}
    return all(cell.values[k] == v for k, v in used.items())


def reference_of(cell: Cell | None, data: ReportData) -> Cell | None:
    """The baseline to show beside a cell: `ce`, else the first."""
    rivals = baselines_of(cell, data)
    return next((b for b in rivals if b.method == "ce"), rivals[0] if rivals else None)


def paired(cell: Cell, baseline: Cell, column: str = "accuracy") -> Estimate:
    """cell - baseline over the seeds that both have finished."""
    ours, theirs = cell.by_seed(column), baseline.by_seed(column)
    return estimate(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def against(reference: Cell, cell: Cell, data: ReportData) -> tuple[Cell, Estimate] | None:
    """The baseline of a reference's method at a cell's settings, and the cell less it; None without one."""
    if cell.method == reference.method:
        return None
    rivals = (b for b in baselines_of(cell, data) if b.method == reference.method)
    baseline = next(rivals, None)
    return None if baseline is None else (baseline, paired(cell, baseline))


def differences(data: ReportData) -> list[tuple[Cell, Estimate]]:
    """The selected cell against each baseline, `ce` first."""
    cell = chosen(data)
    if cell is None:
        return []
    rivals = sorted(baselines_of(cell, data), key=lambda b: b.method != "ce")
    return [(b, paired(cell, b)) for b in rivals]


def like_with_like(
    rows: pd.DataFrame, fixed: Sequence[str], varied: Sequence[str], favourite: Cell | None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The rows at one setting of the fixed keys: the one with the most points of the varied columns.

    Equal settings go to the favourite cell's own, then to the one with more rows, then to the earlier.

    Returns:
        the setting, and its rows.
    """
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(_identities(rows, fixed)):
        groups.setdefault(name, []).append(place)
    own = None if favourite is None else repr([favourite.values.get(k) for k in fixed])
    points = _identities(rows, varied)
    best = max(groups, key=lambda g: (len({points[i] for i in groups[g]}), g == own, len(groups[g])))
    taken = rows.iloc[groups[best]]
    return {k: plain(taken.iloc[0][k]) for k in fixed}, taken


def _identities(rows: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    values = [[plain(v) for v in rows[k]] for k in columns]
    return [repr([column[i] for column in values]) for i in range(len(rows))]


def points_of(rows: pd.DataFrame, columns: Sequence[str]) -> list[pd.DataFrame]:
    """The rows of each distinct point of the columns, in the order of the sweep."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(_identities(rows, columns)):
        groups.setdefault(name, []).append(place)
    return [rows.iloc[places] for places in groups.values()]


# --- how values read --------------------------------------------------------------------------


def labels(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or the whole of it where two keys share that part."""
    last = [k.rpartition(".")[2] for k in keys]
    return {k: k if last.count(short) > 1 else short for k, short in zip(keys, last, strict=True)}


def setting(key: str, value: Any) -> str:
    """A searched value as text; an infinite threshold keeps all images, so it reads 'none'.

    >>> setting("filter.threshold", float("inf")), setting("generator.steps", 400.0)
    ('none', '400')
    """
    value = plain(value)
    if value is None:
        return "-"
    if key.endswith("threshold") and value in (math.inf, "inf"):
        return "none"
    if isinstance(value, list):
        return "[" + ", ".join(setting(key, v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.6g}"
    return str(value)


def settings(values: Mapping[str, Any], keys: Sequence[str], *, equals: str = "=") -> str:
    """'synthetic_weight=1, threshold=2'; keys that are not used are left out."""
    names = labels(keys)
    used = {k: v for k, v in values.items() if v is not None}
    return ", ".join(f"{names[k]}{equals}{setting(k, v)}" for k, v in used.items())


def number(value: Any, digits: int = 1, *, sign: bool = False) -> str:
    """A measure as text, '-' where it is not known."""
    known = finite(value)
    if known is None:
        return "-"
    return f"{known:{'+' if sign else ''}.{digits}f}"


def whole(value: Any) -> str:
    """A mean of counts: without decimals where it has none."""
    known = finite(value)
    return "-" if known is None else f"{known:.0f}" if known.is_integer() else f"{known:.1f}"
