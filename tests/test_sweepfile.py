"""Bases, overlays and expected rows: what they come to, and mistakes in them told in one line."""

import pytest
import yaml

from diffult_ray import config, sweep
from diffult_ray.config import Experiment, Sweep
from diffult_ray.errors import BadInput
from diffult_ray.expected import has, matched
from diffult_ray.plan import make_plan

BASE = """\
experiment: {select: test, generator: {steps: 5, regulariser: cbdm, tau: 3}, classifier: {steps: 7}}
"""
SWEEP = """\
name: own
base: base.yaml
experiment: {generator: {tau: 2}}
search: {filter.threshold: {grid: [1, 2]}, classifier.seed: {grid: [0, 1, 2]}}
"""
ROW = "{where: {filter.threshold: 2}, value: 46.6, standing: reported, source: a table}"


@pytest.fixture
def write(tmp_path):
    """Writes a file; returns its path as text."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def own(write) -> str:
    """The sweep on its base."""
    write("base.yaml", BASE)
    return write("own.yaml", SWEEP)


def values(built: Sweep, key: str) -> list:
    return [e.at(key) for e in config.experiments(built)]


def told(*arguments, **named) -> str:
    with pytest.raises(BadInput) as refused:
        config.load(*arguments, **named)
    assert "\n" not in str(refused.value) and refused.value.exit_code == 2
    return str(refused.value)


# --- the base -----------------------------------------------------------------------------------


def test_a_file_lies_over_its_base_mapping_by_mapping(own):
    (e, *_) = config.load(own).cells
    assert (e.generator.steps, e.generator.tau, e.classifier.steps, e.select) == (5, 2, 7, "test")


def test_a_list_is_replaced_whole_and_the_base_has_no_other_say(write):
    experiment = "experiment: {select: test, generator: {channels: [8, 16, 24]}}\n"
    write("base.yaml", f"name: base\nbaselines: [ce]\n{experiment}")
    text = "name: own\nbase: base.yaml\nexperiment: {generator: {channels: [8]}}\n"
    built = config.load(write("own.yaml", text))
    assert values(built, "generator.channels") == [(8,)]
    assert (built.name, built.baselines) == ("own", ())


def test_a_base_may_have_a_base_and_be_a_shipped_sweep(write):
    write("middle.yaml", "base: digits\nexperiment: {generator: {steps: 9}}\n")
    (e,) = config.load(write("own.yaml", "name: own\nbase: middle.yaml\n")).cells
    assert (e.dataset.imbalance_factor, e.generator.steps, e.generator.channels) == (50, 9, (16, 32))


def test_a_resolved_sweep_needs_no_base_and_no_overlay(own, write):
    built = config.load(own, overlay="smoke")
    again = config.load(write("resolved.yaml", yaml.safe_dump(built.model_dump(mode="json"))))
    assert make_plan(again).id == make_plan(built).id
    assert again.differs == built.differs and again.name == "own-smoke"


@pytest.mark.parametrize(("base", "said"), [
    ("nowhere", "own.yaml: base: neither a file beside this one nor a shipped base (got 'nowhere')"),
    ("digts", "did you mean 'digits'?"),
    ("5", "own.yaml: base: neither"),
    ("", "(got null); write the name of a file"),
    ("own.yaml", "own.yaml: base: leads back to a file that builds on it (got 'own.yaml')"),
    ("round.yaml", "round.yaml: base: leads back to a file that builds on it (got 'own.yaml')"),
    ("empty.yaml", "empty.yaml: a base is a mapping with `experiment`"),
    ("other.yaml", "other.yaml: a base is a mapping with `experiment` (got null)"),
    ("broken.yaml", "broken.yaml: line 2: is not readable as YAML"),
])
def test_a_mistake_in_the_base(base, said, write):
    write("round.yaml", "base: own.yaml\nexperiment: {seed: 1}\n")
    write("empty.yaml", "")
    write("other.yaml", "experimnt: {seed: 1}\n")
    write("broken.yaml", "experiment: [1\n")
    assert said in told(write("own.yaml", f"name: own\nbase: {base}\n"))


def test_a_mistake_is_told_where_it_was_written(write, own):
    write("base.yaml", BASE.replace("steps: 5", "steps: -5"))
    assert "base.yaml: experiment.generator.steps: must be greater" in told(own, ["generator.tau=1"])
    write("base.yaml", BASE)
    write("own.yaml", SWEEP.replace("tau: 2", "tau: -2"))
    assert "own.yaml: experiment.generator.tau: must be greater" in told(own)
    write("own.yaml", SWEEP)
    over = write("small.yaml", "differs: small\nexperiment: {generator: {stps: 1}}\n")
    assert "small.yaml: experiment.generator.stps: no such key; did you mean 'generator.steps'?" in told(
        own, overlay=over)
    over = write("small.yaml", "differs: small\nsearch: {filter.threshold: {grid: [-1]}}\n")
    assert "small.yaml: search.filter.threshold: must be greater" in told(own, overlay=over)


# --- overlays -----------------------------------------------------------------------------------

OVERLAY = """\
differs: small, on another set
replace: {dataset: {name: digits, max_per_class: 20}}
experiment: {generator: {steps: 1}}
search: {classifier.seed: {grid: [0]}, generation.per_class: {grid: [1, 2]}}
"""


def test_an_overlay_replaces_sections_sets_keys_and_cuts_axes(own, write):
    cifar = "select: test, dataset: {name: cifar100, root: /data}"
    write("base.yaml", BASE.replace("select: test", cifar))
    built = config.load(own, overlay=write("small.yaml", OVERLAY))
    assert built.name == "own-small"
    assert built.differs == ("small, on another set",)
    assert values(built, "filter.threshold") == [1, 2]
    assert set(values(built, "classifier.seed")) == {0} and set(values(built, "generator.steps")) == {1}
    assert set(values(built, "generator.tau")) == {2} and set(values(built, "generation.per_class")) == {500}
    dataset = built.cells[0].dataset
    assert (dataset.name, dataset.max_per_class, dataset.root) == ("digits", 20, None)


def test_an_override_wins_over_an_overlay(own, write):
    built = config.load(own, ["generator.steps=3", "classifier.seed=8", "name=x"], write("s.yaml", OVERLAY))
    assert set(values(built, "generator.steps")) == {3} and set(values(built, "classifier.seed")) == {8}
    assert built.name == "x"


def test_an_axis_that_moves_together_with_others_keeps_its_length_or_goes(write):
    search = "search: {zip: {generator.steps: [5, 6], generator.tau: [1, 2]}}\n"
    experiment = "experiment: {select: test, generator: {regulariser: cbdm}}\n"
    own = write("own.yaml", f"name: own\n{experiment}{search}")
    over = "differs: small\nsearch: {generator.steps: %s}\n"
    two = config.load(own, overlay=write("s.yaml", over % "{grid: [1, 2]}"))
    assert (values(two, "generator.steps"), values(two, "generator.tau")) == ([1, 2], [1, 2])
    gone = config.load(own, overlay=write("s.yaml", over % "null"))
    assert config.searched(gone) == ["generator.tau"]
    said = told(own, overlay=write("s.yaml", over % "{grid: [1, 2, 3]}"))
    assert "s.yaml: search.generator.steps: must be a grid of 2 values, as it moves together with" in said


@pytest.mark.parametrize(("text", "said"), [
    ("", "small.yaml: an overlay is a mapping with `differs`"),
    ("experiment: {seed: 1}\n", "small.yaml: differs: must say why the results do not compare"),
    ("differs: a\nexperimnt: {seed: 1}\n", "small.yaml: experimnt: no such key; an overlay has"),
    ("differs: a\nexperiment: 5\n", "small.yaml: experiment: must be a mapping (got 5)"),
    ("differs: a\nsearch: {generator.stps: {grid: [1]}}\n", "small.yaml: search.generator.stps: no such key"),
    ("differs: a\nreplace: {datset: {name: digits}}\n", "small.yaml: experiment.datset: no such key"),
    ("differs: a\nreplace: {dataset: 5}\n", "small.yaml: experiment.dataset: must be a mapping"),
    ("differs: a\nsearch: {filter.threshold: {grd: [1]}}\n", "small.yaml: search.filter.threshold.grd: no"),
])
def test_a_mistake_in_an_overlay(own, write, text, said):
    assert said in told(own, overlay=write("small.yaml", text))


def test_an_overlay_that_is_not_there(own):
    assert told(own, overlay="smok") == (
        "--overlay: neither a file nor a shipped overlay (got 'smok'); did you mean 'smoke'?"
    )
    assert told(own, overlay="x.yaml").startswith("--overlay: no such file (got 'x.yaml')")


def test_the_front_door_takes_an_overlay(tmp_path, capsys):
    words = ["cifar100_lt/threshold", "--overlay", "smoke", "--plan", "--storage", str(tmp_path / "s")]
    assert sweep.main(words) == 0
    assert capsys.readouterr().out.startswith("sweep cifar100_lt/threshold-smoke: 14 trials")
    assert sweep.main([*words[:2], "smok", *words[3:]]) == 2
    assert capsys.readouterr().err.startswith("error: --overlay: neither")


def test_the_command_in_the_report_has_the_overlay():
    arguments = sweep._parser().parse_intermixed_args(["digits", "seed=1", "--overlay", "smoke"])
    assert sweep._command("digits", ["seed=1"], arguments) == (
        "python -m diffult_ray.sweep digits seed=1 --overlay smoke"
    )


# --- what is expected ---------------------------------------------------------------------------


def with_rows(write, *rows: str, search: str = "{filter.threshold: {grid: [1, 2, null]}}") -> str:
    listed = "".join(f"\n  - {row}" for row in rows)
    return write("own.yaml", f"name: own\nexperiment: {{select: test}}\nbaselines: [ce]\nsearch: {search}\n"
                             f"expected:{listed}\n")


def cells_of(path: str, *overrides: str) -> list[int]:
    return [len(cells) for _, cells in matched(make_plan(config.load(path, overrides)))]


def test_a_row_is_of_the_cells_that_have_its_values(write):
    rows = [ROW, ROW.replace("2}", "inf}"), ROW.replace("2}", "null}"), ROW.replace("2}", "5}"),
            ROW.replace("filter.threshold: 2", "method: ce"),
            ROW.replace("filter.threshold: 2", "generator.steps: 300000"),
            "{label: BBN, value: 1, standing: code, source: s}"]
    assert cells_of(with_rows(write, *rows)) == [1, 1, 1, 0, 1, 3, 0]


def test_a_value_that_the_method_does_not_use_is_no_match():
    plain, cbdm = (Experiment(select="test", generator={"regulariser": r}) for r in ("none", "cbdm"))
    assert not has(plain, {"generator.tau": 1}) and has(cbdm, {"generator.tau": 1})
    assert not has(cbdm, {"generator.tau": 2}) and not has(cbdm, {"method": "ce"})


def test_bands_are_compared_as_the_configuration_reads_them(write):
    row = ROW.replace("filter.threshold: 2", "filter.bands: [ID]")
    path = with_rows(write, row, search="{filter.bands: {grid: [[ID], [OOD]]}}")
    assert cells_of(path, "filter.threshold=null") == [1]


def test_overrides_that_change_results_are_said_to_differ(write):
    path = with_rows(write, ROW)
    assert config.load(path, ["seed=3", "resources.generator.workers=2"]).differs == ()
    assert config.load(path, ["generator.steps=3", "dataset.root=null"]).differs == (
        "with the override generator.steps=3",
    )
    assert config.load("digits", ["generator.steps=3"]).differs == ()  # nothing is expected there


@pytest.mark.parametrize(("row", "said"), [
    (ROW.replace("filter.threshold", "filter.treshold"),
     "where: names no such key (got 'filter.treshold'); did you mean 'filter.threshold'?"),
    (ROW.replace("2}", "many}"), "expected[0].where: no cell could have this filter.threshold"),
    (ROW.replace("source:", "measure: acc, source:"), "expected[0].measure: must be 'accuracy'"),
    (ROW.replace("reported", "rumoured"), "expected[0].standing: must be 'reported', 'secondary', 'code'"),
    (ROW.replace("46.6", "high"), "expected[0].value: must be a valid number"),
    (ROW.replace("value: 46.6, ", ""), "expected[0].value: is missing"),
    (ROW.replace(", source: a table", ""), "expected[0].source: is missing"),
    ("{value: 1, standing: code, source: s}", "expected[0].where: is needed without `label`"),
    (ROW.replace("value", "valu"), "expected[0]"),
])
def test_a_mistake_in_a_row(write, row, said):
    line = told(with_rows(write, row))
    assert "own.yaml: " in line and said in line
