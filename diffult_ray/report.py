"""What a sweep found, as a table on the console and as `report.html` with its figures."""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files, footprint, statistics, summary
from diffult_ray.summary import METHOD, Cell, Estimate, ReportData, number, selected, setting, settings, whole

if TYPE_CHECKING:
    from rich.console import Console

    from diffult_ray.figures import Picture

__all__ = ["ReportData", "print_table", "selected", "write"]

LOG_WIDTH = 100  # columns of a job log, which says nothing of its width
CELLS_SHOWN = 40  # on the console; the page has all
ERRORS_SHOWN, ERROR_LENGTH = 8, 300
UNKNOWN = "-"


# --- what both say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A measure of a cell as a column of text."""

    heading: str
    text: Callable[[Cell], str]
    title: str = ""


def _mean_of(column: str, digits: int = 1) -> Callable[[Cell], str]:
    return lambda cell: number(cell.mean(column), digits)


def _known(columns: Sequence[Column], cells: Sequence[Cell]) -> list[Column]:
    """The columns that say something of at least one cell."""
    return [c for c in columns if any(c.text(cell) != UNKNOWN for cell in cells)]


def _setting_columns(data: ReportData) -> list[Column]:
    def text(key: str) -> Callable[[Cell], str]:
        return lambda cell: setting(key, cell.values[key])

    return [Column(name, text(key), key) for key, name in summary.labels(data.keys).items()]


def _name(cell: Cell, data: ReportData) -> str:
    return " ".join(filter(None, [cell.name, settings(cell.values, data.keys)]))


def _with_n(e: Estimate, *, sign: bool = False) -> str:
    return f"{number(e.mean, sign=sign)} ± {number(e.deviation)} (n = {e.n})"


def _against(baseline: Cell, e: Estimate) -> str:
    return f"{_with_n(e, sign=True)} against {baseline.name}"


def _rule(data: ReportData) -> str:
    """How the selected cell was chosen, and among how many."""
    rivals = summary.contenders(data)
    seeds = rivals[0].over_seeds(data.selection_column).n
    fewer = sum(c.method == METHOD for c in summary.cells(data)) - len(rivals)
    rule = (
        f"Chosen by mean {data.select} accuracy among {_count(len(rivals), f'{METHOD} cell')} "
        f"with {_count(seeds, 'finished seed')}"
    )
    return f"{rule}; {_count(fewer, 'cell')} with fewer did not compete." if fewer else f"{rule}."


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


NO_BASELINE = "No baseline at its settings to compare it to."
OPTIMISTIC = (
    "The test set both chose this cell and measures it, so its accuracy is optimistic; "
    "`select: validation` keeps the two apart."
)


def _nothing_selected(data: ReportData) -> str:
    trials = int((data.results["method"] == METHOD).sum())
    if not trials:
        return f"No cell is selected: the sweep has no {METHOD} trial."
    return f"No cell is selected: no {METHOD} trial has a {data.select} accuracy."


@dataclass(frozen=True)
class Failure:
    """Trials that ended with the same error."""

    error: str
    trials: list[str]


def failures(data: ReportData) -> list[Failure]:
    """The errors of the trials that failed, each once, with the trials that met it."""
    met: dict[str, list[str]] = {}
    for cell in summary.cells(data):
        for _, row in cell.trials[cell.trials["status"] == "failed"].iterrows():
            error = summary.plain(row["error"]) or "ended without a result"
            met.setdefault(str(error), []).append(f"{_name(cell, data)}, seed {row['seed']}")
    return [Failure(error, trials) for error, trials in met.items()]


# --- on the console ---------------------------------------------------------------------------


def print_table(data: ReportData, console: Console) -> None:
    """One line a cell, of many the foremost, the selected one marked; then the comparison and what failed.

    Lines fit the terminal, or 100 columns of a log; where the settings do not, they follow the table.
    """
    from rich.text import Text

    width = console.width if console.is_terminal else max(console.width, LOG_WIDTH)
    encodes = console.encoding.lower().startswith("utf")

    def say(line: str, style: str = "") -> None:
        text = line if encodes else line.replace("±", "+-")
        console.print(Text(text, style=style), soft_wrap=True)

    for line, style in _table_lines(data, width):
        say(line, style)
    for sentence in [*_comparison(data), *(f"Note: {note}." for note in data.notes), *_failed(data)]:
        indent = " " * (len(sentence) - len(sentence.lstrip()) + 2)
        for line in textwrap.wrap(sentence, width, subsequent_indent=indent, break_long_words=False):
            say(line)


@dataclass(frozen=True)
class Layout:
    """Aligned lines: headings, a row for each cell, and what the rows refer to."""

    head: list[str]
    rows: list[str]
    legend: list[str]

    @property
    def width(self) -> int:
        return max(map(len, [*self.head, *self.rows]))


def _table_lines(data: ReportData, width: int) -> Iterator[tuple[str, str]]:
    """(line, style), in the roomiest layout that fits."""
    everything, marked = summary.cells(data), selected(data)
    found = _foremost(data, everything)
    for layout in _layouts(data, found):
        if layout.width <= width:
            break
    yield from ((line, "bold") for line in layout.head)
    yield "-" * layout.width, "dim"
    for cell, line in zip(found, layout.rows, strict=True):
        yield line, "bold green" if cell.id == marked else ""
    yield from ((line, "") for line in layout.legend)
    if len(found) < len(everything):
        more = _count(len(everything) - len(found), "cell")
        yield f"and {more} of lower or no mean {data.select} accuracy, in the report", "dim"
    yield "", ""


def _foremost(data: ReportData, found: Sequence[Cell]) -> list[Cell]:
    """All, in their order, or of many the selected one, the baselines and the highest means."""
    marked = selected(data)

    def rank(cell: Cell) -> tuple[bool, bool, float]:
        mean = cell.mean(data.selection_column)
        return cell.id != marked, cell.method == METHOD, math.inf if mean is None else -mean

    kept = {cell.id for cell in sorted(found, key=rank)[:CELLS_SHOWN]}
    return [cell for cell in found if cell.id in kept]


def _layouts(data: ReportData, found: Sequence[Cell]) -> Iterator[Layout]:
    """The settings in columns of their own, or a number for them and a legend."""
    places = {cell.id: str(place) for place, cell in enumerate(found, 1)}
    legend = [f"  {places[c.id]}: {settings(c.values, data.keys)}" for c in found]
    for gap in (2, 1):
        yield _layout(data, found, _setting_columns(data), gap, [])
    used = [line for line in legend if not line.endswith(": ")]
    yield _layout(data, found, [Column("cell", lambda cell: places[cell.id])], 1, used)


def _layout(
    data: ReportData, found: Sequence[Cell], settings_in: Sequence[Column], gap: int, legend: list[str]
) -> Layout:
    marked = selected(data)
    columns = [
        Column("", lambda cell: "*" if cell.id == marked else ""),
        Column("method", lambda cell: cell.name),
        *settings_in,
        *_console_measures(data, found),
    ]
    headings = [c.heading.replace("_", "_\n").split("\n") for c in columns]
    depth = max(map(len, headings))
    table = [[h[i - depth] if i >= depth - len(h) else "" for h in headings] for i in range(depth)]
    table += [[c.text(cell) for c in columns] for cell in found]
    lines = _aligned(table, left={0, 1}, gap=gap)
    return Layout(lines[:depth], lines[depth:], legend)


def _aligned(table: Sequence[Sequence[str]], left: set[int], gap: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = [
            text.ljust(w) if i in left else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * gap).join(padded).rstrip())
    return lines


def _console_measures(data: ReportData, found: Sequence[Cell]) -> list[Column]:
    judged = [Column("valid.", _mean_of("validation_accuracy"))] if data.select == "validation" else []
    optional = [
        Column("many", _mean_of("accuracy_many")),
        Column("med.", _mean_of("accuracy_medium")),
        Column("few", _mean_of("accuracy_few")),
        *judged,
        Column("kept", lambda cell: whole(cell.mean("kept"))),
        Column("FID", _mean_of("fid", 2)),
        Column("IS", _mean_of("inception_score", 2)),
    ]
    return [Column("test accuracy\n± sd (n)", _accuracy), *_known(optional, found)]


def _accuracy(cell: Cell) -> str:
    e = cell.over_seeds("accuracy")
    return f"{number(e.mean)} ± {number(e.deviation):>3} ({e.n})"


def _comparison(data: ReportData) -> list[str]:
    cell = summary.chosen(data)
    if cell is None:
        return [_nothing_selected(data), *_baselines_compared(data)]
    lines = [
        f"* {_name(cell, data)}: test accuracy {_with_n(cell.over_seeds('accuracy'))}",
        f"  {_rule(data)}",
    ]
    if data.select == "test":
        lines.append(f"  {OPTIMISTIC}")
    pairs = [f"    {_against(b, e)}" for b, e in summary.differences(data)]
    return lines + (["  Seed by seed:", *pairs] if pairs else [f"  {NO_BASELINE}"])


def _baselines_compared(data: ReportData) -> list[str]:
    reference = summary.reference_of(None, data)
    if reference is None:
        return []
    cells = _foremost(data, summary.cells(data))
    found = [(c, pair) for c in cells if (pair := summary.against(reference, c, data)) and pair[1].n]
    lines = [f"    {_name(c, data)}: {_against(b, e)}" for c, (b, e) in found]
    return ["  Seed by seed:", *lines] if lines else []


def _failed(data: ReportData) -> list[str]:
    found = failures(data)
    if not found:
        return []
    total = sum(len(f.trials) for f in found)
    lines = [f"{total} of {_count(len(data.results), 'trial')} failed:"]
    for failure in found[:ERRORS_SHOWN]:
        others = f" and {len(failure.trials) - 1} more" if len(failure.trials) > 1 else ""
        error = " ".join(failure.error.split())[:ERROR_LENGTH]
        lines.append(f"  {failure.trials[0]}{others}: {error}")
    hidden = len(found) - ERRORS_SHOWN
    return lines + ([f"  and {_count(hidden, 'other error')}, in the report"] if hidden > 0 else [])


# --- the page ---------------------------------------------------------------------------------


def write(data: ReportData, folder: Path) -> None:
    """`report.html`, which needs no other file, and its figures as `figures/*.png`.

    Figures of an earlier report that this one does not have are removed: they would be taken for its.
    """
    from diffult_ray.figures import pictures

    drawn = pictures(data)
    kept = {f"{p.name}.png": p.png for p in drawn if p.png is not None}
    for name, png in kept.items():
        files.write_bytes(folder / "figures" / name, png)
    for path in (folder / "figures").glob("*.png"):
        if path.name not in kept:
            path.unlink()
    files.write_bytes(folder / "report.html", _page(data, drawn).encode())


def _page(data: ReportData, drawn: Sequence[Picture]) -> str:
    from importlib.resources import files as resources

    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    source = resources("diffult_ray").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        data=data,
        headline=_headline(data),
        warning=OPTIMISTIC if data.select == "test" and selected(data) else "",
        columns=_page_columns(data),
        cells=summary.cells(data),
        selected=selected(data),
        differences=[_difference(b, e, data) for b, e in summary.differences(data)],
        beside=[_beside(b) for b in statistics.beside(data)],
        correlations=[row for c in statistics.claims(data) for row in _correlation(c, data)],
        pictures=drawn,
        failures=failures(data),
        stages=[_stage(row) for _, row in data.stages.iterrows()],
    )


def _headline(data: ReportData) -> list[str]:
    cell = summary.chosen(data)
    if cell is None:
        return [_nothing_selected(data)]
    first = f"{_name(cell, data)}: test accuracy {_with_n(cell.over_seeds('accuracy'))}"
    pairs = [_against(b, e) for b, e in summary.differences(data)]
    return [first, f"Seed by seed: {'; '.join(pairs)}." if pairs else NO_BASELINE, _rule(data)]


def _page_columns(data: ReportData) -> list[Column]:
    found = summary.cells(data)
    judged = Column("validation", _mean_of("validation_accuracy"), "mean accuracy on the validation set, %")
    return [
        *_setting_columns(data),
        Column("accuracy", _mean_of("accuracy"), "mean test accuracy, %"),
        Column("sd", lambda c: number(c.over_seeds("accuracy").deviation), "sample deviation"),
        Column("n", lambda c: str(c.over_seeds("accuracy").n), "finished trials"),
        Column("95% interval", lambda c: _interval(c.over_seeds("accuracy")), "Student's t, of the mean"),
        *_known([*_against_reference(data), judged, *_measures()], found),
    ]


def _against_reference(data: ReportData) -> list[Column]:
    """The paired difference of each cell to one baseline, which the column names."""
    named = summary.reference_of(summary.chosen(data), data)
    if named is None:
        return []

    def text(cell: Cell) -> str:
        found = summary.against(named, cell, data)
        if found is None:
            return UNKNOWN
        e = found[1]
        between = f" ({_interval(e, sign=True)})" if e.interval else ""
        return f"{number(e.mean, sign=True)}{between}"

    title = "difference of accuracies in points, paired by seed, and its 95% interval"
    return [Column(f"against {named.method}", text, title)]


def _measures() -> list[Column]:
    return [
        Column("balanced", _mean_of("balanced_accuracy"), "mean of the classes' accuracies, %"),
        Column("many", _mean_of("accuracy_many"), "classes of more than 100 training images, %"),
        Column("medium", _mean_of("accuracy_medium"), "classes of 20 to 100 training images, %"),
        Column("few", _mean_of("accuracy_few"), "classes of fewer than 20 training images, %"),
        Column("nll", _mean_of("nll", 3), "mean negative log-likelihood, nats"),
        Column("ece", _mean_of("ece"), "expected calibration error, %"),
        Column("generated", lambda c: whole(c.mean("generated")), "images generated or copied"),
        Column("kept", lambda c: whole(c.mean("kept")), "of them kept for training"),
        Column("trained on", lambda c: whole(c.mean("train_images")), "images, real and added ones"),
        Column("steps", lambda c: whole(c.mean("steps")), "of the classifier"),
        Column("ID/AID/OOD", _bands, "shares of the generated images by band, %"),
        Column("FID", _mean_of("fid", 2), "of the generator, lower is better"),
        Column("IS", _mean_of("inception_score", 2), "of the generator, higher is better"),
        Column("KID", _mean_of("kid", 4), "of the generator, lower is better"),
        Column("precision", _mean_of("precision", 3), "share of generated images among the real ones"),
        Column("recall", _mean_of("recall", 3), "share of real images among the generated ones"),
        Column("memorised", _share_of("memorised"), "generated ones nearer a training one than others, %"),
        Column("expected", _share_of("memorised_expected"), "the same of the training images themselves, %"),
        Column("images", lambda c: whole(c.mean("fid_images")), "generated ones that FID is of"),
        Column("network", _network, "that measures FID, IS, KID, precision and recall"),
    ]


def _bands(cell: Cell) -> str:
    shares = [cell.mean(column) for column in ("p_id", "p_aid", "p_ood")]
    return UNKNOWN if None in shares else "/".join(number(100 * s, 0) for s in shares)


def _share_of(column: str) -> Callable[[Cell], str]:
    def text(cell: Cell) -> str:
        share = cell.mean(column)
        return UNKNOWN if share is None else number(100 * share)

    return text


def _network(cell: Cell) -> str:
    return ", ".join(cell.networks) or UNKNOWN


def _interval(e: Estimate, *, sign: bool = False) -> str:
    if e.interval is None:
        return UNKNOWN
    return " to ".join(number(bound, sign=sign) for bound in e.interval)


def _difference(baseline: Cell, e: Estimate, data: ReportData) -> list[str]:
    measured = [number(e.mean, sign=True), number(e.deviation), str(e.n), _interval(e, sign=True)]
    return [_name(baseline, data), *measured]


def _beside(b: statistics.Beside) -> list[str]:
    ours = UNKNOWN
    if b.ours is not None:
        spread = "" if b.ours.deviation is None else f" ± {statistics.shown(b.measure, b.ours.deviation)}"
        ours = f"{statistics.shown(b.measure, b.ours.mean)}{spread} ({b.ours.n})"
        if not b.compares:
            ours += f", by the {' and '.join(b.networks)} network: not comparable"
    measure = MEASURE_NAMES.get(b.measure, b.measure.replace("_", " "))
    return [b.name, measure, b.standing, b.source, ours, statistics.shown(b.measure, b.theirs)]


MEASURE_NAMES = {
    "fid": "FID", "inception_score": "IS", "p_id": "ID, %", "p_aid": "AID, %", "p_ood": "OOD, %",
    "accuracy_many": "many", "accuracy_medium": "medium", "accuracy_few": "few",
}


def _correlation(c: statistics.Claim, data: ReportData) -> list[list[str]]:
    over = [("generators", c.over_generators), ("settings", c.over_settings)]
    at = settings(c.fixed, data.keys) or UNKNOWN
    return [
        [
            MEASURE_NAMES[c.measure], c.network, at, name,
            number(found.pearson, 2), _bounds(found.pearson_interval),
            number(found.spearman, 2), _bounds(found.spearman_interval), str(found.n),
        ]
        for name, found in over if found is not None
    ]


def _bounds(interval: tuple[float, float] | None) -> str:
    return UNKNOWN if interval is None else " to ".join(number(bound, 2) for bound in interval)


def _stage(row: Any) -> list[str]:
    named = [str(row[column]) for column in ("stage", "key", "status")]
    peaks = [number(row[name], 0) for name in footprint.PEAKS]
    return [*named, number(row["seconds"]), *peaks, str(row["trials"])]
