"""One name, one definition: more of the same goes on, another experiment under the name is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffult_ray import config, definition, files
from diffult_ray.errors import BadInput
from tests.test_bad_input import one_line, tree

TEXT = """
name: small
experiment:
  select: test
  generator: {steps: 5, channels: [8, 16]}
search: {classifier.synthetic_weight: {grid: [0.3, 1]}, classifier.seed: {grid: [0, 1]}}
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "small.yaml").write_text(TEXT)
    return lambda *overrides: config.load(str(tmp_path / "small.yaml"), overrides)


@pytest.fixture
def folder(tmp_path, load) -> Path:
    """The sweep as a run with one result leaves it."""
    made = tmp_path / "storage" / "sweeps" / "small"
    text = yaml.safe_dump(load().model_dump(mode="json"), sort_keys=False)
    files.write_bytes(made / "sweep.yaml", text.encode())
    files.write_json(made / "trials" / "a.json", {"status": "done"})
    return made


@pytest.mark.parametrize("overrides", [
    [],
    ["search.classifier.seed.grid=[0,1,2,3]"],
    ["search.classifier.synthetic_weight.grid=[0.3,0.5]"],
    ["classifier.synthetic_weight=2"],
    ["seed=4"], ["generator.seed=4"], ["dataset.seed=4"],
    ["generator.steps=50"], ["generation.per_class=700"],
    ["baselines=[ce, mixup]"],
    ["quality.images=100"], ["resources.generator.workers=2"], ["dataset.loading=memory"],
    ["tune.concurrency=2"], ["tracking.enabled=false"], ["description=other"], ["price.gpu_hour=2"],
    ["classifier.mixup_alpha=0.5"],  # which no trial of it uses
], ids=str)
def test_more_of_the_same_goes_on(overrides, load, folder):
    definition.check(load(*overrides), folder)


@pytest.mark.parametrize(("overrides", "change"), [
    (["generator.channels=[8, 8]"], "generator.channels was [8, 16], is [8, 8]"),
    (["classifier.learning_rate=0.5"], "classifier.learning_rate was 0.1, is 0.5"),
    (["dataset.imbalance_factor=10"], "dataset.imbalance_factor was 100.0, is 10.0"),
    (["filter.bands=[ID]", "filter.threshold=null"],
     'filter.threshold was 2.0, is null; filter.bands was null, is ["ID"]'),
    (["method=mixup", "synthetic=true"], 'method was "diffult", is "mixup"'),
    (["generator.ema=0", "generator.dropout=0", "generator.blocks=1", "generator.flip=false"],
     "generator.blocks was 2, is 1; generator.dropout was 0.1, is 0.0; generator.ema was 0.9999, is 0.0; "
     "and 1 more"),
], ids=str)
def test_another_experiment_under_the_name_is_refused(overrides, change, load, folder):
    with pytest.raises(BadInput) as refused:
        definition.check(load(*overrides), folder)
    told = str(refused.value)
    begin = "name: has results of another definition in this storage: "
    assert told.startswith(f"{begin}{change} (got 'small'); ")
    assert "name=NAME" in told and str(folder) in told and "\n" not in told


def test_what_becomes_an_axis_goes_on(load, folder, tmp_path):
    text = TEXT.replace("search: {", "search: {classifier.learning_rate: {grid: [0.1, 0.2]}, ")
    (tmp_path / "wider.yaml").write_text(text)
    definition.check(config.load(str(tmp_path / "wider.yaml")), folder)


def test_a_definition_without_results_may_be_corrected(load, folder):
    files.write_json(folder / "trials" / "a.json", {"status": "failed"})
    definition.check(load("classifier.learning_rate=0.5"), folder)


def test_a_definition_that_this_version_cannot_read_is_let_be(load, folder):
    for text in ("name: small\ngone: 1\n", "- 1\n", "{", ""):
        (folder / "sweep.yaml").write_text(text)
        definition.check(load("classifier.learning_rate=0.5"), folder)


def test_the_front_door_refuses_in_one_line_and_writes_nothing(folder, load, tmp_path, capsys):
    from diffult_ray import sweep

    before = tree(tmp_path)
    arguments = [str(tmp_path / "small.yaml"), "classifier.momentum=0", "--storage", str(folder.parents[1])]
    assert sweep.main(arguments) == 2
    assert one_line(capsys.readouterr().err).startswith("name: has results of another definition")
    assert tree(tmp_path) == before
