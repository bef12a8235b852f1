"""A sweep is a graph of stages, and each distinct stage is built once."""

import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from diffult_ray import config, pipeline
from diffult_ray.config import METHODS, Experiment, Sweep
from diffult_ray.plan import Plan, describe, make_plan
from diffult_ray.store import Store

ROOT = Path(config.__file__).parents[2]
TAIL = {"max_per_class": 20, "imbalance_factor": 5}


def plan(search=(), baselines=(), **experiment) -> Plan:
    values = {"select": "test", **experiment}
    return make_plan(Sweep(name="small", experiment=values, search=search, baselines=baselines))


def count(p: Plan, name: str) -> int:
    return sum(s.name == name for s in p.stages)


# --- what is shared ---------------------------------------------------------------------------------


def test_the_shipped_digits_sweep_shares_its_stages():
    p = make_plan(config.load("digits"))
    assert len({t.key for t in p.trials}) == len(p.trials)
    assert (count(p, "split"), count(p, "extractor"), count(p, "reference")) == (1, 1, 1)
    generators = [s for s in p.stages if s.name == "generator"]
    assert len(generators) == 3 and len({s.family for s in generators}) == 1
    assert count(p, "images") == count(p, "scores") == count(p, "quality") == 3


def test_weight_threshold_and_classifier_seed_share_everything_before_the_classifier():
    p = plan({
        "classifier.synthetic_weight": {"grid": [0.3, 1]}, "filter.threshold": {"grid": [1, 2, "inf"]},
        "classifier.seed": {"grid": [0, 1]},
    })
    assert len(p.trials) == 12
    assert sorted(s.name for s in p.stages) == sorted(
        ["split", "extractor", "reference", "generator", "images", "scores", "quality"]
    )
    assert set(p.uses.values()) == {12}


def test_the_generators_steps_are_one_family_and_other_keys_are_not():
    p = plan([{"generator.steps": {"grid": [5, 10]}}, {"generator.tau": {"grid": [2]}}],
             generator={"steps": 5, "regulariser": "cbdm"})
    families = [s.family for s in p.stages if s.name == "generator"]
    assert len(families) == 3 and len(set(families)) == 2


def test_inputs_come_before_what_needs_them(imagenet_lists):
    for stages in (p.stages for p in (make_plan(config.load(name)) for name in config.shipped())):
        seen: set[str] = set()
        for stage in stages:
            assert {s.key for s in stage.inputs.values()} <= seen
            seen.add(stage.key)


def test_points_that_come_to_the_same_trial_are_one():
    p = plan([{"filter.threshold": {"grid": [1, 2]}}, {"filter.threshold": {"grid": [2.0, 3]}}])
    assert [t.experiment.filter.threshold for t in p.trials] == [1, 2, 3]
    assert len(plan({"filter.threshold": {"grid": ["inf", None, "none"]}}).trials) == 1


def test_a_description_has_every_stage_and_trial_with_its_uses(tmp_path):
    p = plan({"classifier.seed": {"grid": [0, 1]}}, ["ce"])
    rows = describe(p, Store(tmp_path))
    assert [(s.name, uses) for s, _, uses in rows if s.name in ("split", "generator", "classifier")] == [
        ("split", 4), ("generator", 2), *[("classifier", 1)] * 4
    ]
    assert {status for _, status, _ in rows} == {"to build"}
    Store(tmp_path).work(p.stages[0]).mkdir(parents=True)
    assert describe(p, Store(tmp_path))[0][1] == "partly built"


# --- baselines --------------------------------------------------------------------------------------

SEARCH = {
    "classifier.synthetic_weight": {"grid": [0.3, 1]}, "filter.threshold": {"grid": [1, 2]},
    "generator.steps": {"grid": [5, 10]}, "classifier.seed": {"grid": [0, 1, 2]},
}


def test_a_baseline_is_one_trial_a_seed_where_the_search_does_not_touch_it():
    p = plan(SEARCH, ["ce", "oversample", "reweight"])
    methods = [t.experiment.method for t in p.trials]
    assert Counter(methods) == {"ce": 3, "oversample": 3, "reweight": 3, "diffult": 24}
    assert methods[:9] == ["ce"] * 3 + ["oversample"] * 3 + ["reweight"] * 3
    first = p.trials[0].point
    assert first == {
        "classifier.synthetic_weight": None, "filter.threshold": None, "generator.steps": None,
        "classifier.seed": 0,
    }


def test_baselines_need_nothing_but_the_split():
    assert [s.name for s in plan(SEARCH, ["ce"], method="reweight").stages] == ["split"]


ALL = [m for m in METHODS if m != "diffult"]


def test_every_baseline_stays_on_the_set_alone_beside_a_search_with_synthetic_images():
    """Also where the experiment itself says `synthetic: true`."""
    p = plan({**SEARCH, "synthetic": {"grid": [True]}}, ALL, method="mixup")
    names = [t.name for t in p.trials]
    assert Counter(names) == {**dict.fromkeys(ALL, 3), "mixup+synthetic": 24}
    alone = [t for t in p.trials if not t.experiment.synthetic]
    assert {tuple(s.name for s in t.upstream) for t in alone} == {("split",)}


def test_methods_are_searched_with_and_without_synthetic_images():
    p = plan([
        {"method": {"grid": ["ce", "reweight", "mixup"]}},
        {"method": {"grid": ["diffult", "reweight", "mixup"]}, "synthetic": {"grid": [True]},
         "classifier.synthetic_weight": {"grid": [0.3, 1]}},
    ])
    assert [t.name for t in p.trials] == [
        "ce", "reweight", "mixup", "diffult", "diffult", "reweight+synthetic", "reweight+synthetic",
        "mixup+synthetic", "mixup+synthetic",
    ]
    assert p.trials[0].title == "ce" and p.trials[5].title == "reweight+synthetic synthetic_weight=0.3"
    assert len({t.cell for t in p.trials}) == len(p.trials)
    assert (count(p, "generator"), count(p, "scores"), count(p, "quality")) == (1, 1, 1)
    shared = p.trials[3].stage.inputs["scores"].key
    assert {t.stage.inputs["scores"].key for t in p.trials[3:]} == {shared}


def test_a_method_with_and_without_synthetic_images_is_two_cells():
    p = plan(baselines=["reweight"], method="reweight", synthetic=True)
    assert [t.name for t in p.trials] == ["reweight", "reweight+synthetic"]
    assert len({t.cell for t in p.trials}) == 2


@pytest.mark.parametrize(
    ("key", "values", "distinct"),
    [
        ("classifier.max_margin", [0.3, 0.5], {"ldam_drw": 2}),
        ("classifier.scale", [10, 30], {"ldam_drw": 2}),
        ("classifier.drw_start", [0.5, 0.8], {"ldam_drw": 2}),
        ("classifier.mixup_alpha", [0.2, 1], {"mixup": 2}),
        ("classifier.normalisation", ["weight", "count"], {"reweight": 2, "ldam_drw": 2, "diffult": 2}),
        ("classifier.synthetic_weight", [0.3, 1], {"diffult": 2}),
        ("generation.per_class", [10, 20], {"oversample": 2, "diffult": 2}),
    ],
)
def test_a_key_that_a_method_does_not_use_makes_no_second_trial_of_it(key, values, distinct):
    p = plan({key: {"grid": values}}, ALL)
    assert Counter(t.name for t in p.trials) == {m: distinct.get(m, 1) for m in METHODS}


def test_the_count_matched_baseline_follows_the_count():
    p = plan({"generation.per_class": {"grid": [10, 20]}}, ["ce", "oversample"])
    methods = [t.experiment.method for t in p.trials]
    assert {m: methods.count(m) for m in set(methods)} == {"ce": 1, "oversample": 2, "diffult": 2}


def test_cells_are_trials_that_differ_in_seeds_only():
    p = plan(SEARCH, ["ce"])
    assert len({t.cell for t in p.trials}) == 1 + 8
    assert p.trials[0].title == "ce seed=0"


def test_an_id_is_of_the_trials_and_not_of_their_order():
    one, two = ({"grid": [1, 2]}, {"grid": [2, 1]})
    assert plan({"filter.threshold": one}).id == plan({"filter.threshold": two}).id
    assert plan({"filter.threshold": one}).id != plan({"filter.threshold": {"grid": [1, 3]}}).id


# --- what changes a key -----------------------------------------------------------------------------

BASE = Experiment(
    select="test", dataset=TAIL, generator={"regulariser": "cbdm", "steps": 5},
)


def keys(e: Experiment) -> dict[str, str]:
    return {s.name: s.key for s in pipeline.stages(e)}


def other(value):
    """Another value of the same kind; it need not be one that a sweep file may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "'"
    if isinstance(value, tuple):
        return (*value, 8)
    return 7 if value is None else value + 1


def changed(section: BaseModel, dotted: str) -> BaseModel:
    head, _, rest = dotted.partition(".")
    old = getattr(section, head)
    return section.model_copy(update={head: changed(old, rest) if rest else other(old)})


def with_other(key: str, e: Experiment = BASE) -> Experiment:
    if key == "seed":  # reaches the stages when an experiment is made
        seeds = {s: {"seed": 1} for s in ("extractor", "generator", "generation", "classifier")}
        for stage, value in seeds.items():
            e = e.model_copy(update={stage: getattr(e, stage).model_copy(update=value)})
        return e.model_copy(update={"seed": 1})
    if key == "dataset.name":  # of a set that exists, as the key is of its content
        return e.model_copy(update={"dataset": e.dataset.model_copy(update={"name": "cifar100"})})
    return changed(e, key)


def with_network(name: str) -> Experiment:
    return BASE.model_copy(update={"quality": BASE.quality.model_copy(update={"network": name})})


IN_NO_KEY = {
    "quality.inception_weights",  # of the reference network; of Inception, see tests/test_inception.py
    "dataset.root", "dataset.download", "dataset.loading",  # where the data lie, and how they are read
    "select",  # which images choose between cells
    *(k for k in config.known_keys() if k.startswith("resources.")),  # how fast a stage runs
}
MEASURES = {k for k in config.known_keys() if k.startswith("quality.")}


CELLS = [BASE, *(
    BASE.model_copy(update={"method": method, "synthetic": synthetic})
    for method in ALL for synthetic in (False, True) if (method, synthetic) != ("ce", True)
)]
CROPPED = {"augmentation": "resized_crop"}
STREAMED = BASE.model_copy(update={
    "extractor": BASE.extractor.model_copy(update=CROPPED),
    "classifier": BASE.classifier.model_copy(update=CROPPED),
    "quality": BASE.quality.model_copy(update={
        "reference": BASE.quality.reference.model_copy(update=CROPPED)
    }),
})
CELLS.append(STREAMED)


@pytest.mark.parametrize("key", config.known_keys())
def test_every_key_changes_a_stage_or_is_known_to_change_none(key):
    same = all(keys(e) == keys(with_other(key, e)) for e in CELLS)
    assert same == (key in IN_NO_KEY)


@pytest.mark.parametrize(
    "e", CELLS, ids=[*(config.variant(e.method, e.synthetic) for e in CELLS[:-1]), "streamed"]
)
@pytest.mark.parametrize("key", [k for k in config.known_keys() if k != "method"])
def test_a_key_that_applies_to_a_method_changes_its_trial_and_no_other_does(key, e):
    moved = pipeline.classifier(e).key != pipeline.classifier(with_other(key, e)).key
    searchable = key not in IN_NO_KEY | MEASURES
    assert moved == (searchable and pipeline.applies(key, e))


def test_what_cannot_be_searched_is_what_makes_no_other_trial():
    refused = {k for k in config.known_keys() if config.NOT_SEARCHED.fullmatch(k)}
    assert "quality.network" in refused  # one sweep, one network: its FIDs are on one scale
    assert refused == IN_NO_KEY | MEASURES


def test_a_record_counts_only_for_what_measured_its_generator(tmp_path):
    from diffult_ray.results import write_record
    from diffult_ray.sweep import Session

    store = Store(tmp_path)

    def stored(images: int) -> int:
        p = plan(quality={"images": images}, baselines=["ce"])
        return len(Session(p, store, None, "")._stored_records())

    for trial in plan(quality={"images": 100}, baselines=["ce"]).trials:
        found = {"trial": trial.key, "status": "done", "quality": trial.quality}
        write_record(found, store, "small")
    assert stored(100) == 2
    assert stored(200) == 1  # the baseline has no generator


def test_tau_matters_to_the_regulariser_only():
    plain = BASE.model_copy(update={"generator": BASE.generator.model_copy(update={"regulariser": "none"})})
    assert keys(plain) == keys(with_other("generator.tau", plain))
    assert keys(plain) == keys(with_other("generator.label_distribution", plain))
    designs = [{"generator.regulariser": {"grid": ["none", "cbdm"]}}, {"generator.tau": {"grid": [1, 2]}}]
    designs[1]["generator.regulariser"] = {"grid": ["cbdm"]}
    assert len(plan(designs).trials) == 3


def test_label_drop_and_timesteps_matter_where_they_are_used():
    for key, values in (("label_drop_scope", {"label_drop": 0.0}), ("timesteps", {"objective": "edm"})):
        without = BASE.model_copy(update={"generator": BASE.generator.model_copy(update=values)})
        assert keys(without) == keys(with_other(f"generator.{key}", without))
        assert keys(BASE) != keys(with_other(f"generator.{key}"))


def test_only_an_aid_loss_makes_a_generator_depend_on_the_extractor():
    guided = BASE.model_copy(update={"generator": BASE.generator.model_copy(update={"aid_weight": 0.1})})
    assert list(pipeline.generator(BASE).inputs) == ["split"]
    assert pipeline.generator(guided).inputs["extractor"].key == pipeline.extractor(guided).key
    for e, depends in ((BASE, False), (guided, True)):
        before, after = keys(e), keys(with_other("extractor.seed", e))
        for name in ("generator", "images", "quality"):
            assert (before[name] != after[name]) == depends
        assert keys(e)["scores"] != after["scores"]
    families = {pipeline.generator(e).family for e in (guided, with_other("generator.steps", guided))}
    assert len(families) == 1


def test_a_change_reaches_what_is_after_it_and_nothing_before():
    def moved(key: str) -> set[str]:
        before, after = keys(BASE), keys(with_other(key))
        return {name for name in before if before[name] != after[name]}

    assert moved("classifier.synthetic_weight") == moved("filter.threshold") == {"classifier"}
    assert moved("filter.distance") == {"scores", "classifier"}
    assert moved("generation.per_class") == {"images", "scores", "classifier"}
    assert moved("generation.guidance") == {"images", "scores", "quality", "classifier"}
    assert moved("extractor.seed") == {"extractor", "scores", "classifier"}
    assert moved("quality.images") == {"quality"}
    assert moved("quality.reference.steps") == {"reference", "quality"}
    assert moved("dataset.seed") == set(keys(BASE))


@pytest.mark.parametrize("stage", sorted(pipeline.VERSIONS))
def test_a_new_version_of_a_stage_is_another_artifact(stage, monkeypatch):
    base = with_network("inception") if stage == "inception" else BASE
    before = keys(base)[stage]
    monkeypatch.setitem(pipeline.VERSIONS, stage, 1000)
    # A section of its own, as stages that have their key already keep it.
    fresh = base.model_copy(update={"dataset": base.dataset.model_copy(update={"root": stage})})
    assert keys(fresh)[stage] != before


# --- what does not ------------------------------------------------------------------------------------

TEXT = """
name: small
experiment:
  select: test
  generator: {steps: 5, learning_rate: 0.001}
  filter: {threshold: 2}
"""
SAME = {
    "comments and order": """
# The same.
experiment:
  filter:
    threshold: 2.0  # drops OOD
  generator: {learning_rate: 1e-3, steps: 5}
  select: test
name: small
""",
    "defaults written out": TEXT + "  classifier: {epochs: 200, momentum: 0.9, seed: 0}\n  seed: 0\n",
    "the papers threshold left out": TEXT.replace("  filter: {threshold: 2}\n", ""),
    "resources": TEXT + "  resources: {generator: {workers: 4, gpus: 1}, scores: {cpus: 2}}\n",
    "what the method is": TEXT + "  method: diffult\n  synthetic: true\n",
    "null for its images": TEXT + "  synthetic: null\n",
    "keys of other methods": TEXT + "  classifier: {mixup_alpha: 0.2, scale: 10, drw_start: 0}\n",
    "the place of the data": TEXT + "  dataset: {root: /data}\n",
    "a search of one point": TEXT + "search: {generator.steps: {grid: [5]}}\n",
}


def of_text(text: str, folder: Path) -> Plan:
    (folder / "small.yaml").write_text(text)
    return make_plan(config.load(str(folder / "small.yaml")))


@pytest.mark.parametrize("case", SAME)
def test_the_same_experiment_in_other_words_has_the_same_keys(case, tmp_path):
    one, two = of_text(TEXT, tmp_path), of_text(SAME[case], tmp_path)
    assert [s.key for s in one.stages] == [s.key for s in two.stages]
    assert one.id == two.id


def test_every_default_written_out_changes_no_key(tmp_path):
    one = of_text(TEXT, tmp_path)
    whole = one.trials[0].experiment.model_dump(mode="json")
    assert whole["generator"]["ema"] == 0.9999
    two = of_text(yaml.safe_dump({"name": "small", "experiment": whole}), tmp_path)
    assert [s.key for s in one.stages] == [s.key for s in two.stages]
    assert one.id == two.id


def test_keys_know_nothing_of_the_storage(tmp_path):
    stage = pipeline.split(BASE)
    names = {Store(tmp_path / place).folder(stage).name for place in ("a", "b")}
    assert names == {stage.key}


def test_keys_are_the_same_in_every_process():
    script = "from diffult_ray import config, plan; print(plan.make_plan(config.load('digits')).id)"
    found = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found == {make_plan(config.load("digits")).id + "\n"}


# --- the shipped sweeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", config.shipped())
def test_a_shipped_sweep_loads_under_its_own_name_and_says_what_it_is(name, imagenet_lists):
    path = config.shipped()[name]
    built = config.load(name)
    assert built.name == name and built.description and make_plan(built).trials
    for part in ("# Command:", "# Cost:", "# Expected:", "# Source:"):
        assert part in path.read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The project's wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_every_file_of_the_package_and_every_sweep(installed):
    files = {p.relative_to(ROOT) for p in (ROOT / "diffult_ray").rglob("*") if p.is_file()}
    wanted = {str(p) for p in files if "__pycache__" not in p.parts}
    sweeps = {f"diffult_ray/shipped_sweeps/{name}.yaml" for name in config.shipped()}
    there = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    assert wanted | sweeps <= there
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "diffult-ray = diffult_ray.sweep:run" in scripts.read_text()


def test_an_installed_wheel_finds_the_shipped_sweeps_by_name(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    script = "from diffult_ray import config; print(config.__file__, *config.shipped())"
    module, *names = run("-c", script).split()
    assert Path(module).is_relative_to(installed) and names == list(config.shipped())
    shown = run("-m", "diffult_ray.sweep", "digits", "--plan", "--storage", str(tmp_path / "s"))
    assert shown.startswith("sweep digits: ")
