"""FLOPs of a stage and the rate at which they are done, where nothing alike is stored."""

from __future__ import annotations

import os
import re

import pytest
import torch

from diffult_ray import files, flops
from diffult_ray.costs import Costs
from diffult_ray.plan import Plan, text
from diffult_ray.store import Store
from tests.test_costs import plan, store_all

FACTS = flops.Facts(8, 1, 10, (10, 8, 6, 4, 2, 0), 1000)


def stage_of(made: Plan, name: str):
    return next(s for s in [*made.stages, made.trials[0].stage] if s.name == name)


def work(name: str, **experiment) -> flops.Work:
    return flops.work_of(stage_of(plan(**experiment), name), FACTS)


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "storage")
    store_all(made, plan())
    return made


def test_a_training_step_is_three_forward_passes_of_the_batch():
    found = work("generator", generator={"steps": 100, "channels": [8], "batch_size": 16})
    assert found.flops == 3 * 16 * found.forward > 0
    assert work("classifier", classifier={"epochs": 3, "batch_size": 32}).unit == 3 * 32 * 2  # of 60 images


def test_a_second_label_and_an_extractor_are_counted():
    plain, both = ({"steps": 9, "channels": [8], "regulariser": r} for r in ("none", "cbdm"))
    once = work("generator", generator=plain).flops
    assert work("generator", generator=both).flops == pytest.approx(1.9 * once)  # a tenth has no label
    by_sample = work("generator", generator={**both, "label_drop_scope": "sample"})
    assert by_sample.flops == pytest.approx(2 * once)
    guided = work("generator", generator={**plain, "aid_weight": 0.1})
    assert guided.extra > 0 and guided.flops > once


def test_guidance_and_heun_ask_twice():
    ddim = {"per_class": 10, "sampler": "ddim", "steps": 20}
    assert work("images", generation={**ddim, "guidance": 0}).unit == 1
    assert work("images", generation={**ddim, "guidance": 1}).unit == 2
    edm = {"generator": {"objective": "edm", "steps": 9}, "generation": {"sampler": "heun", "guidance": 1}}
    assert work("quality", **edm).unit == 4


def test_as_many_are_counted_as_in_the_models_page():
    """docs/MODELS.md: ResNet-32 on 32x32 colour images, 138 M."""
    facts = flops.Facts(32, 3, 100, None, None)
    network = flops.Network.classifier({"architecture": "resnet32"}, facts)
    assert flops.forward(network) == pytest.approx(138e6, rel=0.01)


def test_epochs_of_a_set_that_must_be_read_first_are_not_known():
    unknown = flops.Facts(8, 3, 1000, None, None)
    stage = stage_of(plan(classifier={"epochs": 3}), "classifier")
    assert flops.work_of(stage, unknown) is None


def test_a_rate_is_that_of_the_stored_stage_of_nearest_size(store):
    """A U-Net of 8 channels took 100 seconds for 100 steps; one of 16 takes as much more as it has FLOPs."""
    other = plan(generator={"steps": 50, "channels": [16]}, classifier={"steps": 50, "architecture": "cnn"})
    costs = Costs(other, store, counted=True)
    small, large = (work("generator", generator={"steps": 9, "channels": [c]}).flops for c in (8, 16))
    found = costs.of(stage_of(other, "generator"))
    assert found.seconds == pytest.approx(50 * large / small)
    key = stage_of(plan(), "generator").key[:8]
    assert re.fullmatch(rf"from \S+ MFLOP an image at \S+ .FLOP/s, as generator {key} reached", found.basis)
    assert re.search(r"images \w{8} reached", costs.of(stage_of(other, "images")).basis)


def test_a_rate_of_another_magnitude_is_measured_instead(store):
    other = plan(generator={"steps": 50, "channels": [64]})
    assert Costs(other, store, counted=True).of(stage_of(other, "generator")).basis.endswith("measured here")


def test_a_measured_rate_is_of_all_workers_and_leaves_torch_as_it_was():
    threads, found = torch.get_num_threads(), work("generator", generator={"steps": 9, "channels": [8]})
    one = flops.here(found, {"workers": 1, "cpus": 1.0, "gpus": 0.0})
    assert flops.here(found, {"workers": 3, "cpus": 1.0, "gpus": 0.0}) == 3 * one > 0
    assert torch.get_num_threads() == threads


def test_a_rate_is_measured_once_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = work("generator", generator={"steps": 9, "channels": [8]})
    one = {"workers": 1, "cpus": 1.0, "gpus": 0.0}
    first = flops.here(found, one)
    assert flops.here(found, one) == first
    for note in tmp_path.glob("diffult-rates-*/*"):
        os.utime(note, (0, 0))
    assert flops.here(found, one) != first


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of machines without a GPU")
def test_without_the_gpu_that_is_asked_for_nothing_is_measured(tmp_path):
    made = plan(resources={"generator": {"gpus": 1}})
    told = list(text(made, Store(tmp_path / "none")))
    generator = next(line for line in told if line.startswith("  generator"))
    found = re.search("unknown, no generator like it .* no GPU here .*; (.* [GT]FLOP)$", generator)
    left = next(line for line in told if line.startswith("left to do"))
    assert left.endswith(f"and 2 stages of which no time is known, {found[1]}")  # the other is the split


def test_what_a_split_tells_is_taken_before_what_is_expected(store):
    split = stage_of(plan(), "split")
    expected = flops.facts_of(split, Store(store.root / "empty"))
    assert (expected.image_size, expected.classes) == (8, 10) and len(expected.counts) == 10
    files.write_json(store.folder(split) / "split.json", {
        "class_counts": [3, 1], "class_names": ["a", "b"], "image_size": 16, "channels": 3,
        "parts": {"balanced": 9},
    })
    assert flops.facts_of(split, store) == flops.Facts(16, 3, 2, (3, 1), 9)
