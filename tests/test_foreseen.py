"""What a split tells of trials that could only fail: one line, exit code 2, and nothing is trained."""

from __future__ import annotations

import pandas as pd
import pytest

from diffult_ray import sweep
from tests.conftest import TINY


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    bands = "filter.bands: {grid: [[OOD], [ID, OOD]]}"
    path.write_text(TINY.replace("filter.threshold: {grid: [2.0, inf]}", bands))
    return path


def run(path, tmp_path, capsys, *overrides: str) -> str:
    storage = tmp_path / "storage"
    assert sweep.main([str(path), *overrides, "--storage", str(storage)]) == 2
    assert {p.name for p in (storage / "artifacts").iterdir()} == {"split"}
    assert not (storage / "sweeps").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_pool_without_images_has_no_band(tiny, tmp_path, capsys):
    told = run(tiny, tmp_path, capsys, "generation.per_class=3")
    assert "experiment.generation.per_class: must be above the 3 images of the smallest class" in told


def test_a_generator_without_images(tiny, tmp_path, capsys):
    told = run(tiny, tmp_path, capsys, "dataset.max_per_class=101", "dataset.imbalance_factor=1",
               "generation.per_class=120", "generator.head_share=0")
    assert "generator.head_share: leaves no image: every class is a head class" in told


def test_classes_of_one_image(tiny, tmp_path, capsys):
    told = run(tiny, tmp_path, capsys, "dataset.max_per_class=1", "dataset.imbalance_factor=1")
    assert "experiment.dataset: must have a class of two training images or more" in told


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_bands_that_turn_out_to_be_empty_end_their_trial_alone(workers, new_door):
    text = TINY.replace("filter.threshold: {grid: [2.0, inf]}", "filter.bands: {grid: [[OOD], [ID, AID]]}")
    text = text[: text.index("  - generator.steps")].replace("baselines: [ce, oversample]", "baselines: []")
    given = f"filter: {{scope: global}}\n  resources: {{classifier: {{workers: {workers}}}, "
    text = text.replace("resources: {", given)
    door = new_door(text.replace("grid: [0, 1]", "grid: [0]"))
    done = door.run("resources.classifier.cpus=0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    frame = pd.read_parquet(door.storage / "sweeps" / "tiny" / "results.parquet")
    assert sorted(frame["status"]) == ["done", "failed"]
    (error,) = frame[frame["status"] == "failed"]["error"]
    assert error.startswith("ValueError: filter.bands [OOD] keeps none of the ")
    assert done.stdout.count("FAILED") == 1 and "Traceback" not in done.stderr
