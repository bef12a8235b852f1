"""Sweep files and overrides become typed, frozen experiments. What is refused is in test_bad_input.py."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffult_ray import config
from diffult_ray.config import Experiment, Filter, Generator, Sweep
from diffult_ray.errors import BadInput
from diffult_ray.plan import make_plan


def sweep(search=(), **experiment) -> Sweep:
    return Sweep(name="small", experiment={"select": "test", **experiment}, search=search)


def values(built: Sweep, key: str) -> list:
    return [e.at(key) for e in config.experiments(built)]


@pytest.fixture
def written(tmp_path):
    """Writes a sweep file; `select: test` unless the text says otherwise."""

    def write(text: str) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return str(path)

    return write


# --- experiments ----------------------------------------------------------------------------------


def test_an_experiment_is_frozen():
    e = Experiment(select="test")
    with pytest.raises(ValidationError):
        e.seed = 1
    with pytest.raises(ValidationError):
        e.classifier.steps = 1


def test_the_stage_seeds_are_the_seed_unless_they_are_named():
    e = Experiment(select="test", seed=7, generator={"seed": 3})
    seeds = {k: e.at(f"{k}.seed") for k in ("extractor", "generator", "generation", "classifier", "dataset")}
    assert seeds == {"extractor": 7, "generator": 3, "generation": 7, "classifier": 7, "dataset": 0}


def test_the_seed_of_the_search_reaches_the_stages():
    built = sweep(search=[{"seed": {"grid": [1, 2]}}], generator={"seed": 9})
    assert values(built, "classifier.seed") == [1, 2]
    assert values(built, "generator.seed") == [9, 9]


def test_synthetic_images_are_diffults_unless_others_ask_for_them():
    given = [{}, {"method": "reweight"}, {"method": "mixup", "synthetic": True}, {"synthetic": None},
             {"method": "ldam_drw", "synthetic": None}]
    assert [Experiment(select="test", **g).synthetic for g in given] == [True, False, True, True, False]


def test_a_baseline_is_on_the_set_alone_and_diffult_is_not():
    built = Sweep(name="s", experiment={"select": "test", "method": "mixup", "synthetic": True},
                  baselines=["ce", "mixup", "diffult"])
    found = [(e.method, e.synthetic) for e in config.experiments(built)]
    assert found == [("ce", False), ("mixup", False), ("diffult", True), ("mixup", True)]


def test_the_method_of_an_override_brings_its_own_images(written):
    (e,) = config.load(written("name: small\nexperiment: {select: test}\n"), ["method=ldam_drw"]).cells
    assert (e.method, e.synthetic) == ("ldam_drw", False)
    with pytest.raises(BadInput, match="override method=ce: ce has no synthetic images"):
        config.load(written("name: small\nexperiment: {select: test, synthetic: true}\n"), ["method=ce"])


@pytest.mark.parametrize("given", [math.inf, "inf", ".inf", "none", "None", None])
def test_a_threshold_of_none_keeps_all(given):
    assert Filter(threshold=given).threshold == math.inf


def test_the_threshold_is_the_papers_unless_bands_are_named():
    assert Filter().threshold == 2.0
    assert Filter(bands=["ID", "AID"]).threshold is None
    assert Filter(bands=["ID"], threshold=None).bands == ("ID",)


def test_a_classifier_has_one_length():
    lengths = [(e.classifier.steps, e.classifier.epochs) for e in (
        Experiment(select="test"),
        Experiment(select="test", classifier={"steps": 5}),
        Experiment(select="test", classifier={"epochs": 5}),
        Experiment(select="test", classifier={"epochs": None, "steps": None}),
    )]
    assert lengths == [(None, 200), (5, None), (None, 5), (None, 200)]


def test_a_number_may_be_whole_or_in_yamls_text(written):
    generator = "{regulariser: cbdm, learning_rate: 1, tau: 1e-3, steps: 1e3}"
    text = f"name: small\nexperiment: {{select: test, generator: {generator}}}\n"
    (e,) = config.experiments(config.load(written(text)))
    assert (e.generator.learning_rate, e.generator.tau, e.generator.steps) == (1.0, 0.001, 1000)
    assert isinstance(e.generator.learning_rate, float) and isinstance(e.generator.steps, int)


def test_lists_are_tuples_so_that_sections_can_be_compared_and_hashed():
    one, two = Generator(channels=[16, 32]), Generator(channels=(16, 32))
    assert one == two and hash(one) == hash(two)


# --- searches -------------------------------------------------------------------------------------


def test_a_sweep_without_a_search_is_one_cell():
    assert len(list(config.experiments(sweep()))) == 1
    assert len(list(config.experiments(sweep(search={})))) == 1


def test_grids_multiply_and_the_first_varies_slowest():
    built = sweep(search={"filter.threshold": {"grid": [1, 2]}, "classifier.seed": {"grid": [0, 1]}})
    assert values(built, "filter.threshold") == [1, 1, 2, 2]
    assert values(built, "classifier.seed") == [0, 1, 0, 1]
    assert config.searched(built) == ["filter.threshold", "classifier.seed"]


def test_designs_add_up():
    built = sweep(search=[{"filter.threshold": {"grid": [1, 3]}}, {"generator.steps": {"grid": [5]}}])
    cells = list(zip(values(built, "filter.threshold"), values(built, "generator.steps"), strict=True))
    assert cells == [(1, 300_000), (3, 300_000), (2, 5)]
    assert config.searched(built) == ["filter.threshold", "generator.steps"]


def test_zipped_keys_move_together():
    group = {"generator.steps": [5, 6], "generation.steps": [7, 8]}
    built = sweep(search={"zip": group, "classifier.seed": {"grid": [0, 1]}})
    moved = list(zip(values(built, "generator.steps"), values(built, "generation.steps"), strict=True))
    assert moved == [(5, 7), (5, 7), (6, 8), (6, 8)]
    two = sweep(search={"zip": [{"seed": [1, 2]}, {"filter.threshold": [1, 2]}]})
    assert values(two, "filter.threshold") == [1, 2, 1, 2]


def test_rules_of_two_keys_hold_at_the_points_and_not_before():
    """`bands` and `threshold` exclude each other, so they can only be searched as a pair."""
    group = {"filter.threshold": [2, None], "filter.bands": [None, ["ID"]]}
    built = sweep(search={"zip": group}, filter={"threshold": 1})
    assert values(built, "filter.bands") == [None, ("ID",)]
    searched = sweep(search={"dataset.validation_per_class": {"grid": [2]}}, select="validation")
    assert values(searched, "dataset.validation_per_class") == [2]


def test_a_searched_key_may_have_a_value_in_the_experiment():
    built = sweep(search={"filter.threshold": {"grid": [1]}}, filter={"threshold": 3})
    assert values(built, "filter.threshold") == [1]


def test_a_value_that_no_point_uses_is_still_checked():
    built = sweep(search={"filter.threshold": {"grid": [1]}}, filter={"threshold": -3})
    with pytest.raises(BadInput, match=r"experiment\.filter\.threshold: must be .*got -3"):
        list(config.experiments(built))


def drawn(samples: int, **axis) -> list[float]:
    search = {"classifier.learning_rate": axis}
    built = Sweep(name="s", experiment={"select": "test"}, search=search, tune={"samples": samples})
    return values(built, "classifier.learning_rate")


@pytest.mark.parametrize(
    "axis", [{"uniform": [0.1, 0.2]}, {"loguniform": [1e-4, 1]}, {"choice": [0.1, 0.2, 0.3]}]
)
def test_draws_are_the_same_again_and_more_samples_only_add(axis):
    few, many = drawn(3, **axis), drawn(40, **axis)
    assert many[:3] == few == drawn(3, **axis)
    assert len(set(many)) > 2
    assert all(0.1 <= v <= 0.3 for v in many) or "loguniform" in axis


def test_a_loguniform_axis_is_uniform_in_the_logarithm():
    many = drawn(400, loguniform=[1e-4, 1])
    assert all(1e-4 <= v <= 1 for v in many)
    below = sum(v < 1e-2 for v in many) / len(many)
    assert abs(below - 0.5) < 0.1  # four standard errors


def test_every_point_of_the_grid_gets_the_same_draws():
    search = {"classifier.seed": {"grid": [0, 1]}, "filter.threshold": {"uniform": [1, 3]}}
    built = Sweep(name="s", experiment={"select": "test"}, search=search, tune={"samples": 4})
    first, second = values(built, "filter.threshold")[:4], values(built, "filter.threshold")[4:]
    assert first == second and len(set(first)) == 4


# --- overrides --------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_later_ones_over_earlier():
    built = config.load("digits", ["generator.dropout=0.2", "experiment.generator.dropout=0.3", "name=x/y"])
    assert set(values(built, "generator.dropout")) == {0.3}
    assert built.name == "x/y"


def test_an_override_of_one_section_leaves_what_shares_its_anchor():
    (e, *_) = config.load("digits", ["extractor.batch_size=3"]).cells
    assert (e.extractor.batch_size, e.quality.reference.batch_size, e.classifier.batch_size) == (3, 64, 64)


def test_an_override_reaches_a_section_that_the_file_does_not_have(written):
    overrides = ["select=test", "generator.channels=[16, 32]", "tune.samples=2"]
    built = config.load(written("name: small\n"), overrides)
    assert values(built, "generator.channels") == [(16, 32)]
    assert built.tune.samples == 2


def test_an_override_of_a_searched_key_takes_its_axis_out_of_every_design(written):
    designs = [{"filter.threshold": {"grid": [1, 2]}, "seed": {"grid": [1, 2]}}, {"seed": {"grid": [3]}}]
    text = yaml.safe_dump({"name": "small", "experiment": {"select": "test"}, "search": designs})
    built = config.load(written(text), ["seed=5"])
    assert config.searched(built) == ["filter.threshold"]
    assert values(built, "seed") == [5, 5, 5]


ZIPPED = """\
name: small
experiment: {select: test}
search: {zip: {generator.steps: [5, 6], generator.seed: [1, 2]}}
"""


def test_an_override_of_a_zipped_key_leaves_the_others(written):
    one = config.load(written(ZIPPED), ["generator.steps=9"])
    assert (values(one, "generator.steps"), values(one, "generator.seed")) == ([9, 9], [1, 2])
    both = config.load(written(ZIPPED), ["generator.steps=9", "generator.seed=3"])
    assert (values(both, "generator.seed"), config.searched(both)) == ([3], [])


def test_an_override_of_an_axis_changes_its_values():
    built = config.load("digits", ["search.classifier.seed.grid=[8, 9]"])
    assert set(values(built, "classifier.seed")) == {8, 9}


def test_null_and_text_in_overrides():
    built = config.load("digits", ["filter.threshold=null", "tracking.uri=http://host:5000/?a=b"])
    assert set(values(built, "filter.threshold")) == {math.inf}
    assert built.tracking.uri == "http://host:5000/?a=b"


def test_an_override_of_a_broken_section_leaves_it_to_be_refused(written):
    with pytest.raises(BadInput, match=r"small\.yaml: experiment\.generator: must be a mapping"):
        config.load(written("name: small\nexperiment: {generator: 5}\n"), ["generator.steps=5"])
    with pytest.raises(BadInput, match=r"small\.yaml: experiment: must be a mapping"):
        config.load(written("name: small\nexperiment: 5\n"), ["generator.steps=5"])


def test_a_mistake_points_to_the_override_that_made_it_and_not_to_the_file(written):
    path = written("name: small\nexperiment: {select: test, generator: {steps: -1}}\n")
    with pytest.raises(BadInput, match=r"small\.yaml: experiment\.generator\.steps: "):
        config.load(path, ["generator.tau=1"])
    with pytest.raises(BadInput, match=r"^override generator\.steps=-2: "):
        config.load(path, ["generator.steps=-2"])


# --- a sweep as resolved, and large ones ----------------------------------------------------------


def test_a_resolved_sweep_is_a_sweep_file_of_the_same_trials(written):
    text = "name: small\nexperiment: {select: test}\nsearch: {filter.threshold: {grid: [1, .inf, null]}}\n"
    built = config.load(written(text), ["baselines=[ce]", "filter.distance=nearest"])
    resolved = yaml.safe_dump(built.model_dump(mode="json"))
    assert ".inf" in resolved
    assert make_plan(config.load(written(resolved))).id == make_plan(built).id


LARGE = """
import time
from diffult_ray import config
from diffult_ray.plan import make_plan

def planned(weights):
    grid = ",".join(str(i / 50) for i in range(weights))
    axes = f"classifier.synthetic_weight.grid=[{grid}]", "classifier.seed.grid=[0,1,2,3,4]"
    start = time.process_time()
    plan = make_plan(config.load("large.yaml", [f"search.{axis}" for axis in axes]))
    stages, uses, identity = plan.stages, plan.uses, plan.id
    return len(plan.trials), len(stages), time.process_time() - start

tenth, whole = planned(10), planned(100)
memory = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # ru_maxrss is inherited
print(*tenth[:2], *whole[:2], whole[2] / tenth[2], memory)
"""


def test_the_plan_of_ten_thousand_trials_takes_time_by_their_number(tmp_path):
    """And not by its square; tests/benchmarks/plan.py has the seconds."""
    digits = yaml.safe_load(Path(config.shipped()["digits"]).read_text())
    thresholds = [0.5 + i / 10 for i in range(20)]
    digits["search"] = {
        "classifier.synthetic_weight": {"grid": [1]}, "filter.threshold": {"grid": thresholds},
        "classifier.seed": {"grid": [0]},
    }
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(digits))
    environment = {**os.environ, "PYTHONPATH": str(Path(config.__file__).parents[2])}
    command = [sys.executable, "-c", LARGE]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    *counts, times_longer, kilobytes = (float(v) for v in out.stdout.split())
    assert counts == [1_015, 7, 10_015, 7]
    assert times_longer < 40  # by the square it would be a hundred
    assert kilobytes < 500 * 1024


def test_the_reference_of_the_keys_is_up_to_date():
    """docs/CONFIGURATION.md is what `python docs/configuration.py` writes."""
    import runpy

    docs = Path(__file__).resolve().parents[1] / "docs"
    assert runpy.run_path(str(docs / "configuration.py"))["page"]() == (docs / "CONFIGURATION.md").read_text()
