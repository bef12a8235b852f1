"""The stages' loops on a GPU, in this process and without Ray: switches, checkpoints, and same seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffult_ray import config, files, pipeline
from diffult_ray.allotment import Allotment
from diffult_ray.config import StageResources
from diffult_ray.config.experiment import GeneratorResources
from diffult_ray.stages import Order, classifier, generator, training
from diffult_ray.stages.sampler import Sampler
from diffult_ray.stages.split import build as build_split
from tests.conftest import TINY

SWITCHES = {
    "usual": {}, "untuned": {"tuned": False}, "in parts": {"accumulate": 2},
    "compiled": {"compile": True}, "graphs": {"compile": True, "graphs": True},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    path.write_text(TINY)
    sweep = config.load(str(path), ["search.filter.threshold.grid=[2]", "generator.steps=60"])
    return next(e for e in config.experiments(sweep) if e.method == "diffult")


@pytest.fixture(scope="module")
def split(experiment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    stage = pipeline.split(experiment)
    order = Order(dict(stage.config), {}, made(folder / "out"), made(folder / "work"))
    build_split([order], stage.resources)
    return folder / "out"


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def trained(experiment, split: Path, folder: Path, checkpoint_seconds: float = 30.0, **switches) -> Path:
    """A generator of the tiny sweep."""
    stage = pipeline.generator(experiment)
    out, work = made(folder / "out"), made(folder / "work")
    payload = {
        "config": dict(stage.config), "inputs": {"split": str(split)},
        "outs": {int(stage.config["steps"]): str(out)},
    }
    training.run_here(
        generator._loop, payload, resources=GeneratorResources(gpus=1, **switches),
        work=work, checkpoint_seconds=checkpoint_seconds,
    )
    return out


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in files.read_json(folder / "history.json")]


@pytest.fixture(scope="module")
def usual(gpu, experiment, split, tmp_path_factory) -> Path:
    return trained(experiment, split, tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_a_generator_by_rounding(usual, experiment, split, tmp_path, name):
    found = losses(trained(experiment, split, tmp_path, **SWITCHES[name]))
    assert found == pytest.approx(losses(usual), rel=0.02)
    assert found[-1] < 0.7 * found[0]


def test_the_same_seeds_train_the_same_generator(usual, experiment, split, tmp_path):
    again = trained(experiment, split, tmp_path)
    assert losses(again) == losses(usual)
    own, other = (files.read_tensors(next((f / "unet").glob("*.safetensors"))) for f in (usual, again))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_generator_goes_on_from_its_checkpoint(usual, experiment, split, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    saved = training.Run.save

    def save_and_stop(run, tensors, numbers):
        saved(run, tensors, numbers)
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(training.Run, "save", save_and_stop)
        trained(experiment, split, tmp_path, checkpoint_seconds=0.0)
    out = trained(experiment, split, tmp_path)
    assert 0 < files.read_json(out / "summary.json")["trained_now"] < 60
    assert losses(out) == pytest.approx(losses(usual), rel=1e-3)


@pytest.mark.parametrize("switches", [{}, {"compile": True, "graphs": True}], ids=["usual", "graphs"])
def test_the_same_seeds_give_the_same_images_whatever_their_company(gpu, usual, switches):
    generation = {"sampler": "heun", "steps": 6, "guidance": 1.5}
    sampler = Sampler(usual, generation, gpu, Allotment(gpus=1, **switches))
    labels, seeds = np.arange(40) % 10, np.arange(40) + 1000
    images = sampler(labels, seeds)
    assert images.dtype == np.uint8 and images.std() > 10
    assert (sampler(labels, seeds) == images).all()
    assert (sampler(labels[7:9], seeds[7:9]) == images[7:9]).all()


@pytest.mark.parametrize("name", ["usual", "compiled", "graphs"])
def test_a_classifier_trains_as_on_the_cpu(gpu, experiment, split, tmp_path, name):
    stage = pipeline.extractor(experiment)
    accuracies = {}
    for on, values in {"cpu": {}, name: {"gpus": 1, **SWITCHES[name]}}.items():
        order = Order(dict(stage.config), {"split": split}, made(tmp_path / on / "out"),
                      made(tmp_path / on / "work"))
        payload = classifier._payload(order, part="train")
        training.run_here(
            classifier._loop, payload, resources=StageResources(**values), work=order.work
        )
        accuracies[on] = files.read_json(order.out / "summary.json")["accuracy"]
        curve = losses(order.out)
        assert np.mean(curve[-5:]) < 0.7 * np.mean(curve[:5])
    assert abs(accuracies[name] - accuracies["cpu"]) < 15
