"""A mistake of the user's ends in one line that says where, the rule, the value and what to do.

Nothing is written, nothing is started: the exit code is 2, or 3 for a request that can never fit.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffult_ray import interruption, sweep

SMALL = """\
name: small
experiment:
  dataset: {validation_per_class: 2, max_per_class: 20, imbalance_factor: 5}
search:
  filter.threshold: {grid: [1, 2]}
"""

pytestmark = pytest.mark.timeout(30)  # what is not refused would start a sweep


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No storage or cluster of the environment's; the signal handler of `main` goes with the test."""
    for name in ("DIFFULT_STORAGE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the front door on a file's text and arguments; returns the one line of a refusal."""

    def run(text: str | bytes, *arguments: str, code: int = 2) -> str:
        file, storage = tmp_path / "small.yaml", tmp_path / "storage"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        assert sweep.main([str(file), *arguments, "--storage", str(storage)]) == code
        assert not storage.exists()
        out, err = capsys.readouterr()
        assert out == ""
        return one_line(err)

    return run


def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip()


def with_search(text: str) -> str:
    return SMALL.partition("search:")[0] + text


def with_line(line: str) -> str:
    """The small sweep with a line more in `experiment`."""
    return SMALL.replace("experiment:\n", f"experiment:\n  {line}\n")


def test_the_sweep_that_the_mistakes_are_made_in_is_a_good_one(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert sweep.main([str(tmp_path / "small.yaml"), "--plan", "--storage", str(tmp_path / "s")]) == 0
    assert "2 trials" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


# --- the experiment -------------------------------------------------------------------------------

IN_THE_EXPERIMENT = {
    "unknown key": (
        "generator: {stps: 5}",
        "experiment.generator.stps",
        "no such key",
        "did you mean 'generator.steps'?",
    ),
    "unknown section": ("generatr: {steps: 5}", "experiment.generatr", "no such key", "'generator'?"),
    "dotted key": (
        "generator.steps: 5",
        "experiment.generator.steps",
        "no such key",
        "as in generator: {steps: ...}",
    ),
    "text for a whole number": (
        "generator: {steps: many}",
        "experiment.generator.steps",
        "must be a valid integer",
        "got 'many'",
        "the default is 300000",
    ),
    "a fraction for a whole number": (
        "generator: {steps: 2.5}",
        "experiment.generator.steps",
        "fractional",
        "got 2.5",
        "whole number",
    ),
    "true for a whole number": (
        "generator: {steps: true}",
        "experiment.generator.steps",
        "not true or false",
        "got True",
        "default",
    ),
    "true for a number": (
        "classifier: {learning_rate: true}",
        "experiment.classifier.learning_rate",
        "not true",
        "0.1",
    ),
    "a number for a switch": (
        "generator: {flip: 7}",
        "experiment.generator.flip",
        "boolean",
        "got 7",
        "true",
    ),
    "a number for a section": (
        "generator: 5",
        "experiment.generator",
        "must be a mapping",
        "got 5",
        "its keys are objective, channels",
    ),
    "nothing for a section": (
        "generator:",
        "experiment.generator",
        "must be a mapping",
        "got null",
        "its keys are objective, channels",
    ),
    "a number for a list": (
        "generator: {channels: 16}",
        "experiment.generator.channels",
        "must be a list",
        "got 16",
        "one a level",
    ),
    "an item of a list": (
        "generator: {channels: [16, 20]}",
        "experiment.generator.channels[1]",
        "multiple of 8",
        "got 20",
    ),
    "an empty list": (
        "generator: {channels: []}",
        "generator.channels",
        "at least 1",
        "got []",
        "one a level",
    ),
    "unknown method": (
        "method: oversampel",
        "experiment.method",
        "must be 'diffult', 'ce'",
        "got 'oversampel'",
        "did you mean 'oversample'?",
    ),
    "unknown sampler": (
        "generation: {sampler: euler}",
        "experiment.generation.sampler",
        "must be 'ddpm', 'ddim'",
        "got 'euler'",
        "the default is",
    ),
    "cross-entropy with synthetic images": (
        "method: ce\n  synthetic: true",
        "experiment.synthetic",
        "ce has no synthetic images",
        "got True",
        "with them it is `method: diffult`",
    ),
    "diffult without synthetic images": (
        "synthetic: false",
        "experiment.synthetic",
        "diffult has synthetic images",
        "got False",
        "without them it is `method: ce`",
    ),
    "text for whether there are synthetic images": (
        "synthetic: some",
        "experiment.synthetic",
        "boolean",
        "got 'some'",
        "the kept synthetic images",
    ),
    "a normalisation that is none": (
        "classifier: {normalisation: sum}",
        "experiment.classifier.normalisation",
        "must be 'weight' or 'count'",
        "got 'sum'",
    ),
    "a margin below zero": ("classifier: {max_margin: -0.1}", "classifier.max_margin", "got -0.1", "0.5"),
    "a scale of zero": ("classifier: {scale: 0}", "classifier.scale", "greater than 0", "got 0", "30"),
    "weights after the end": ("classifier: {drw_start: 1.5}", "classifier.drw_start", "got 1.5", "0.8"),
    "an alpha of zero": ("classifier: {mixup_alpha: 0}", "classifier.mixup_alpha", "greater than 0", "got 0"),
    "out of range": (
        "classifier: {momentum: 1}",
        "experiment.classifier.momentum",
        "must be less than 1",
        "got 1",
        "0.9",
    ),
    "no number": ("classifier: {learning_rate: .nan}", "learning_rate", "finite", "got nan", "0.1"),
    "infinite": ("classifier: {learning_rate: inf}", "learning_rate", "finite", "got inf", "0.1"),
    "a weight below zero": (
        "classifier: {synthetic_weight: -0.5}",
        "experiment.classifier.synthetic_weight",
        "must be greater than or equal to 0",
        "got -0.5",
        "the default is 0.3",
    ),
    "a threshold below zero": (
        "filter: {threshold: -1}",
        "experiment.filter.threshold",
        "must be greater than or equal to 0",
        "got -1",
        "2 drops OOD",
    ),
    "a threshold that is no number": (
        "filter: {threshold: .nan}",
        "filter.threshold",
        "got nan",
        "2 drops OOD",
    ),
    "a seed too large": ("seed: 4294967296", "experiment.seed", "must be less than", "below 2**32"),
    "a seed below zero": ("seed: -1", "experiment.seed", "must be greater", "got -1", "below 2**32"),
    "two lengths": (
        "classifier: {steps: 5, epochs: 5}",
        "experiment.classifier.steps",
        "exclude each other",
        "to null",
    ),
    "two filters": (
        "filter: {bands: [ID]}",
        "search.filter.threshold: `threshold` and `bands` exclude each other",
        "to null",
    ),
    "more steps than the generator has": (
        "generation: {steps: 1001}",
        "experiment.generation.steps",
        "at most generator.timesteps, 1000",
        "got 1001",
        "lower it",
    ),
    "tau without its regulariser": (
        "generator: {tau: 2}",
        "experiment.generator.tau",
        "is for `regulariser: cbdm`",
        "got 2",
        "or drop this key",
    ),
    "a label distribution without its regulariser": (
        "generator: {label_distribution: uniform}",
        "experiment.generator.label_distribution",
        "is for `regulariser: cbdm`",
        "got 'uniform'",
    ),
    "an unknown label distribution": (
        "generator: {regulariser: cbdm, label_distribution: even}",
        "experiment.generator.label_distribution",
        "must be 'frequencies', 'uniform' or 'balanced'",
        "got 'even'",
    ),
    "a scope of no label drop": (
        "generator: {label_drop: 0, label_drop_scope: sample}\n  generation: {guidance: 0}",
        "experiment.generator.label_drop_scope",
        "is for `label_drop` above 0",
        "got 'sample'",
    ),
    "guidance without a null class": (
        "generator: {label_drop: 0}",
        "experiment.generation.guidance",
        "needs a null class, and `generator.label_drop: 0` trains none",
        "got 1.5",
        "set it to 0, or raise generator.label_drop",
    ),
    "a single step of heun": (
        "generation: {sampler: heun, steps: 1}",
        "experiment.generation.steps",
        "must be 2 or more for `sampler: heun`",
        "got 1",
    ),
    "a sampler of ddpm for edm": (
        "generator: {objective: edm}\n  generation: {sampler: ddim}",
        "experiment.generation.sampler",
        "does not sample a generator of `objective: edm`",
        "got 'ddim'",
        "take heun or dpmsolver++",
    ),
    "timesteps of edm": (
        "generator: {objective: edm, timesteps: 500}",
        "experiment.generator.timesteps",
        "is for `objective: ddpm`",
        "got 500",
    ),
    "a regulariser of ddpm for edm": (
        "generator: {objective: edm, regulariser: cbdm}",
        "experiment.generator.regulariser",
        "is for `objective: ddpm`, as its weight is t / T",
        "got 'cbdm'",
        "set it to none",
    ),
    "an aid loss below zero": (
        "generator: {aid_weight: -1}",
        "experiment.generator.aid_weight",
        "must be greater than or equal to 0",
        "got -1",
    ),
}


@pytest.mark.parametrize("case", IN_THE_EXPERIMENT)
def test_a_mistake_in_the_experiment(refused, case):
    line, *said = IN_THE_EXPERIMENT[case]
    told = refused(with_line(line))
    assert "small.yaml: " in told
    for part in said:
        assert part in told


IN_A_SEARCH_OF_GENERATORS = {
    "tau": ("{generator.regulariser: {grid: [none, cbdm]}, generator.tau: {grid: [1, 2]}}",
            "search.generator.tau: is for `regulariser: cbdm` (got 2.0)"),
    "guidance": ("{generator.label_drop: {grid: [0, 0.1]}}",
                 "search.generator.label_drop: needs a null class"),
    "objective": ("{generator.objective: {grid: [ddpm, edm]}}",
                  "search.generator.objective: does not sample a generator of `objective: edm`"),
    "sampler": ("{generation.sampler: {grid: [ddim, heun]}, generation.steps: {grid: [1]}}",
                "search.generation.steps: must be 2 or more for `sampler: heun` (got 1)"),
}


@pytest.mark.parametrize("case", IN_A_SEARCH_OF_GENERATORS)
def test_a_search_of_generators_that_do_not_go_together_points_to_its_axis(refused, case):
    text, said = IN_A_SEARCH_OF_GENERATORS[case]
    searching = with_search(f"search: {text}\n")
    assert said in refused(searching.replace("experiment:\n", "experiment:\n  generation: {sampler: ddim}\n"))


def test_selection_needs_validation_images(refused):
    told = refused(SMALL.replace("validation_per_class: 2, ", ""))
    assert "small.yaml: experiment.dataset.validation_per_class: " in told
    assert "`select: validation` needs" in told and "(got 0); set it, or `select: test`" in told


# --- the file -------------------------------------------------------------------------------------

WHOLE_FILES = {
    "empty": ("", "a mapping with `name`", "got 'an empty file'", "a copy of a shipped sweep"),
    "only comments": ("# nothing\n", "a mapping with `name`", "got 'an empty file'"),
    "a list": ("- name: small\n", "a mapping with `name`", "got [{'name': 'small'}]", "a copy"),
    "a number": ("5\n", "not readable as YAML", "int"),
    "not YAML": ("name: [small\n", "small.yaml: line 2", "not readable as YAML", "correct it"),
    "a tab": ("name: small\nexperiment:\n\tseed: 0\n", "small.yaml: line 3", "not readable as YAML"),
    "not UTF-8": (b"name: caf\xe9\n", "not readable as YAML", "utf-8"),
    "binary": (b"\x7fELF\x00\x01", "not readable as YAML", "not allowed"),
    "an object": ("name: !!python/object:os.system {}\n", "small.yaml: line 1", "could not determine"),
    "an unknown reference": ("name: ${nowhere}\n", "small.yaml: name", "'nowhere' not found", "correct it"),
    "a key twice": (
        SMALL + "  filter.threshold: {grid: [3]}\n",
        "small.yaml: line 6",
        "duplicate key filter.threshold",
        "write each key once",
    ),
    "no name": (SMALL.replace("name: small\n", ""), "small.yaml: name: is missing; add it"),
    "a name that is a path": (
        SMALL.replace("name: small", "name: ../small"),
        "name: must be letters",
        "got '../small'",
        "as in",
    ),
    "a number as name": (SMALL.replace("small", "5"), "name: must be a valid string", "got 5", "in quotes"),
    "unknown key": (
        SMALL + "baseline: [ce]\n",
        "small.yaml: baseline: no such key; did you mean 'baselines'?",
    ),
    "a section that belongs below": (
        SMALL + "generator: {steps: 5}\n",
        "generator: no such key",
        "`experiment`",
    ),
    "experiment is no mapping": (
        "name: small\nexperiment: 5\n",
        "experiment: must be a mapping",
        "got 5",
        "as in",
    ),
    "one baseline": (SMALL + "baselines: ce\n", "baselines: must be a list", "got 'ce'", "[ce, oversample]"),
    "unknown baseline": (SMALL + "baselines: [ce, ldam]\n", "baselines[1]: must be 'diffult'", "got 'ldam'"),
    "tracking is a word": (
        SMALL + "tracking: off\n",
        "tracking: must be a mapping",
        "got False",
        "enabled, uri",
    ),
    "samples out of range": (SMALL + "tune: {samples: 0}\n", "tune.samples: must be greater", "got 0", "1"),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_a_mistake_in_the_file(refused, case):
    text, *said = WHOLE_FILES[case]
    told = refused(text)
    assert "small.yaml" in told
    for part in said:
        assert part in told


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("nowhere.yaml", "no such file"),
        ("digts", "neither a file nor a shipped sweep (got 'digts'); did you mean 'digits'?"),
        ("", "neither a file nor a shipped sweep (got ''); the shipped ones are"),
        ("x" * 5000, "neither a file nor a shipped sweep"),
        (".", "must be a file, not a folder (got '.')"),
        ("/etc", "must be a file, not a folder (got '/etc')"),
    ],
)
def test_a_sweep_that_is_not_there(name, rule, tmp_path, capsys):
    assert sweep.main([name, "--storage", str(tmp_path / "s")]) == 2
    assert one_line(capsys.readouterr().err).startswith(f"SWEEP: {rule}")
    assert not (tmp_path / "s").exists()


# --- the search -----------------------------------------------------------------------------------

SEARCHES = {
    "an empty grid": (
        "{filter.threshold: {grid: []}}",
        "search.filter.threshold.grid: must not be empty (got []); give",
    ),
    "an empty choice": (
        "{filter.threshold: {choice: []}}",
        "search.filter.threshold.choice: must not be empty",
    ),
    "a bad value": (
        "{filter.threshold: {grid: [1, -2]}}",
        "search.filter.threshold: must be greater",
        "got -2",
        "2 drops OOD",
    ),
    "a bad value of the second design": (
        "[{}, {classifier.synthetic_weight: {grid: [1, -2]}}]",
        "search[1].classifier.synthetic_weight: must be",
        "got -2",
        "0.3",
    ),
    "a bad value that moves with others": (
        "{zip: {filter.threshold: [1, -2], generator.steps: [1, 2]}}",
        "search.zip.filter.threshold: must be",
        "got -2",
        "2 drops OOD",
    ),
    "a range below zero": (
        "{filter.threshold: {uniform: [-1, 2]}}",
        "search.filter.threshold: must be greater",
        "got -1",
        "2 drops",
    ),
    "a choice never drawn": (
        "{classifier.synthetic_weight: {choice: [1, 2, -3]}}",
        "search.classifier.synthetic_weight: ",
        "got -3",
    ),
    "fractions of whole numbers": (
        "{generator.steps: {uniform: [10, 20]}}",
        "search.generator.steps",
        "fractional",
        "a grid or a choice",
    ),
    "a reversed range": (
        "{filter.threshold: {uniform: [2, 1]}}",
        "search.filter.threshold.uniform: must be [low, high]",
        "[2.0, 1.0]",
    ),
    "half a range": ("{filter.threshold: {uniform: [2]}}", "uniform[1]: is missing; write [low, high]"),
    "three bounds": (
        "{filter.threshold: {uniform: [1, 2, 3]}}",
        "uniform: must have at most 2",
        "[low, high]",
    ),
    "a logarithm of zero": ("{filter.threshold: {loguniform: [0, 1]}}", "must start above 0", "take uniform"),
    "a value twice": (
        "{filter.threshold: {grid: [1, 2, 1]}}",
        "grid: must not hold a value twice",
        "take it out",
    ),
    "two kinds": (
        "{filter.threshold: {grid: [1], choice: [2]}}",
        "search.filter.threshold: must have exactly one of grid",
        "got ['grid', 'choice']",
        "as in {grid: [1, 2]}",
    ),
    "no kind": ("{filter.threshold: {}}", "search.filter.threshold: must have exactly one of grid", "got []"),
    "an unknown kind": (
        "{filter.threshold: {gird: [1]}}",
        "search.filter.threshold.gird: no such key",
        "'grid'?",
    ),
    "a bare list": (
        "{filter.threshold: [1, 2]}",
        "search.filter.threshold: must be a mapping",
        "keys are grid",
    ),
    "a bare value": ("{filter.threshold: {grid: 1}}", "search.filter.threshold.grid: must be a list (got 1)"),
    "a method without synthetic images": (
        "{method: {grid: [reweight, ce]}, synthetic: {grid: [true]}}",
        "search.synthetic: ce has no synthetic images (got True)",
        "with them it is `method: diffult`",
    ),
    "a method that is none": (
        "{method: {grid: [ldam]}}",
        "search.method: must be 'diffult', 'ce'",
        "got 'ldam'",
        "did you mean 'ldam_drw'?",
    ),
    "an unknown key": (
        "{filter.treshold: {grid: [1]}}",
        "search.filter.treshold: no such key; did you mean 'filter.threshold'?",
    ),
    "what makes no other trial": (
        "{resources.generator.workers: {grid: [1, 2]}}",
        "search.resources.generator.workers: makes no other",
        "set it under `experiment`",
    ),
    "two axes, one of them in a zip": (
        "{filter.threshold: {grid: [1]}, zip: {filter.threshold: [1, 2], seed: [1, 2]}}",
        "search.zip.filter.threshold: a second axis",
        "beside search.filter.threshold",
        "take one of the two out",
    ),
    "two axes in two zips": (
        "{zip: [{seed: [1, 2]}, {seed: [3, 4]}]}",
        "search.zip[1].seed: a second axis",
        "beside search.zip[0].seed",
    ),
    "a zip of two lengths": (
        "{zip: {seed: [1, 2], filter.threshold: [1]}}",
        "search.zip: must be",
        "of one length",
    ),
    "a zip of nothing": ("{zip: {}}", "search.zip: must be a mapping of keys to lists", "got {}", "as in"),
    "a zip that is a number": (
        "{zip: 5}",
        "search.zip: must be a mapping of keys to lists",
        "got 5",
        "as in",
    ),
    "a number": ("5", "search: must be a list", "got 5", "a mapping of dotted keys to axes"),
    "a list of numbers": ("[5]", "search[0]: must be a mapping", "got 5", "a mapping of dotted keys to axes"),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_mistake_in_the_search(refused, case):
    text, *said = SEARCHES[case]
    told = refused(with_search(f"search: {text}\n"))
    assert "small.yaml: " in told
    for part in said:
        assert part in told


# --- the command line -------------------------------------------------------------------------------

OVERRIDES = {
    "unknown key": ("generator.stps=5", "no such key; did you mean 'generator.steps'?"),
    "unknown section": ("classifer.synthetic_weight=1", "did you mean 'classifier.synthetic_weight'?"),
    "no section": ("treshold=1", "no such key; did you mean 'filter.threshold'?"),
    "unknown sweep key": ("tune.sample=1", "no such key; did you mean 'tune.samples'?"),
    "a whole section": ("tracking=off", "no such key; name one of its keys: enabled, uri"),
    "like nothing": ("zzzz=1", "no such key; they begin with seed, method, synthetic, dataset"),
    "a weight below zero": (
        "classifier.synthetic_weight=-1",
        "must be greater than or equal to 0 (got -1)",
        "0.3",
    ),
    "a threshold below zero": (
        "filter.threshold=-1",
        "must be greater than or equal to 0 (got -1)",
        "2 drops",
    ),
    "wrong type": ("experiment.generator.steps=x", "must be a valid integer", "got 'x'", "default"),
    "not YAML": ("generator.channels=[16", "the value must be YAML", "correct it"),
    "an item of a list": ("baselines=[ce,x]", "must be 'diffult'", "got 'x'", "[ce, oversample]"),
    "a length beside another": ("classifier.epochs=5", "exclude each other", "set one of them to null"),
    "an axis": (
        "search.filter.threshold.grid=[1,-1]",
        "must be greater than or equal to 0 (got -1)",
        "2 drops",
    ),
    "an empty axis": ("search.filter.threshold.grid=[]", "must not be empty (got [])", "at least one"),
    "an axis that is not there": ("search.seed.grid=[1]", "must be search.KEY.KIND=values", "filter"),
    "a kind that is not there": (
        "search.filter.threshold.gird=[1]",
        "KIND one of grid, choice",
        "filter.threshold",
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_mistake_in_an_override(refused, case):
    override, *said = OVERRIDES[case]
    told = refused(with_line("classifier: {steps: 10}"), override)
    assert told.startswith(f"override {override}: ")
    for part in said:
        assert part in told


@pytest.mark.parametrize("override", ["generator.steps", "=5", "generator.steps="])
def test_an_override_has_a_key_and_a_value(refused, override):
    told = refused(SMALL, override)
    assert told == f"override {override!r}: must be key=value; as in generator.steps=500"


@pytest.mark.parametrize("option", ["--plam", "--address"])
def test_a_mistake_in_an_option(option, tmp_path, capsys):
    assert sweep.main(["digits", option]) == 2
    assert one_line(capsys.readouterr().err).startswith("command line: ")


def test_a_long_first_override_is_not_taken_for_a_file(tmp_path, capsys):
    values = ",".join(str(n) for n in range(200))
    arguments = [f"search.classifier.seed.grid=[{values}]", "--plan", "--storage", str(tmp_path)]
    assert sweep.main(arguments) == 0
    assert "sweep digits: " in capsys.readouterr().out


# --- what the machine has to offer ------------------------------------------------------------------


def test_a_data_set_too_small_is_told_before_anything_is_written(refused):
    told = refused(SMALL, "dataset.max_per_class=5000")
    assert "dataset.max_per_class" in told and "5000" in told and "lower it" in told


def test_more_workers_than_the_machine_can_hold(refused):
    told = refused(SMALL, "resources.generator.workers=500", "resources.generator.cpus=2", code=3)
    assert told.startswith(
        "experiment.resources.generator: 500 workers x 2 CPUs = 1000 CPUs, but this machine "
    )
    assert f"holds {len(os.sched_getaffinity(0))} CPUs; ask for fewer workers" in told


@pytest.mark.parametrize(("most", "rule"), [
    (1, "must be at least workers, 2"), (5000, "must be at most generator.batch_size, "),
])
def test_a_range_of_workers_that_is_none(refused, most, rule):
    told = refused(SMALL, "resources.generator.workers=2", f"resources.generator.max_workers={most}")
    assert "resources.generator.max_workers" in told and rule in told and f"(got {most})" in told


def test_tasks_that_would_leave_their_network_on_a_gpu(refused):
    told = refused(SMALL, "resources.images.compute=tasks", "resources.images.gpus=1")
    assert "resources.images.compute" in told and "actors" in told


@pytest.mark.parametrize("missing", ["compile", "gpus"])
def test_cuda_graphs_of_nothing(refused, missing):
    both = {"compile": "resources.images.compile=true", "gpus": "resources.images.gpus=1"}
    given = [value for name, value in both.items() if name != missing]
    told = refused(SMALL, "resources.images.graphs=true", *given)
    assert "resources.images.graphs" in told and "drop graphs" in told


@pytest.mark.parametrize("seconds", ["soon", "0", "-1"])
def test_a_deadline_that_is_no_number_of_seconds(refused, monkeypatch, seconds):
    monkeypatch.setenv("DIFFULT_PLACEMENT_SECONDS", seconds)
    told = refused(SMALL)
    assert told.startswith("DIFFULT_PLACEMENT_SECONDS: must be a number of seconds above 0 (got ")


def test_more_gpus_than_the_machine_can_hold(refused):
    told = refused(SMALL, "resources.classifier.gpus=100", code=3)
    assert "experiment.resources.classifier: 1 workers x 100 GPUs = 100 GPUs, but this machine holds" in told


def test_workers_of_a_stage_that_the_sweep_does_not_have_are_never_asked_for(tmp_path, capsys):
    arguments = ["method=ce", "resources.generator.workers=500", "resources.classifier.workers=501"]
    (tmp_path / "small.yaml").write_text(SMALL)
    assert sweep.main([str(tmp_path / "small.yaml"), *arguments, "--storage", str(tmp_path / "s")]) == 3
    assert "resources.classifier: 501 workers" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_a_storage_folder_below_a_file(tmp_path, capsys, plan):
    (tmp_path / "file").write_text("kept")
    storage = tmp_path / "file" / "storage"
    assert sweep.main(["digits", *plan, "--storage", str(storage)]) == 2
    told = one_line(capsys.readouterr().err)
    assert told.startswith(f"--storage: must be a folder that can be written (got '{storage}'); ")
    assert f"{tmp_path / 'file'} is a file; give another with --storage or DIFFULT_STORAGE" in told
    assert (tmp_path / "file").read_text() == "kept"


def test_a_storage_folder_that_cannot_be_made(capsys):
    assert sweep.main(["digits", "--storage", "/proc/diffult"]) == 2
    assert "must be a folder that can be written (got '/proc/diffult')" in one_line(capsys.readouterr().err)


def test_a_storage_that_is_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert sweep.main(["digits", "--storage", "s3://bucket/diffult"]) == 2
    told = one_line(capsys.readouterr().err)
    assert "(got 's3://bucket/diffult')" in told and "no credentials: set AWS_ACCESS_KEY_ID" in told
    assert sweep.main(["digits", "--storage", "ftp://bucket/diffult"]) == 2
    assert "no storage of ftp:// is known" in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_folder_of_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("DIFFULT_STORAGE", "/proc/diffult")
    assert sweep.main(["digits"]) == 2
    assert "(got '/proc/diffult')" in one_line(capsys.readouterr().err)


def test_a_tracking_store_of_no_known_kind(refused):
    told = refused(SMALL, "tracking.uri=ftp://host/x")
    assert told.startswith("tracking.uri: ") and "(got 'ftp://host/x')" in told


# --- as a process: exit codes, time, and what is left behind -----------------------------------------


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("DIFFULT_STORAGE", "RAY_ADDRESS")}
    command = [sys.executable, "-m", "diffult_ray.sweep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture
def silent_server():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return port


PROCESSES = {
    "override": (2, ["digits", "generator.stps=5"]),
    "missing file": (2, ["nowhere.yaml"]),
    "option": (2, ["--plam"]),
    "capacity": (3, ["digits", "resources.generator.workers=500"]),
    "data": (2, ["digits", "dataset.max_per_class=5000"]),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_process_ends_at_once_and_leaves_its_storage_as_it_was(case, tmp_path):
    code, arguments = PROCESSES[case]
    storage = tmp_path / "storage"
    (storage / "sweeps").mkdir(parents=True)
    (storage / "sweeps" / "kept").write_text("kept")
    before = tree(tmp_path)
    done = run(*arguments, "--storage", str(storage), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    one_line(done.stderr)
    assert tree(tmp_path) == before


def test_a_tracking_server_that_is_not_there(free_port, tmp_path):
    check_unreachable(free_port, tmp_path)


def test_a_tracking_server_that_never_answers(silent_server, tmp_path):
    check_unreachable(silent_server, tmp_path)


def check_unreachable(port: int, folder: Path) -> None:
    uri = f"http://127.0.0.1:{port}"
    done = run("digits", f"tracking.uri={uri}", "--storage", str(folder / "a" / "b"), cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    told = one_line(done.stderr)
    assert told.startswith("tracking.uri: ") and f"(got '{uri}')" in told and "tracking.enabled=false" in told
    assert tree(folder) == {}
