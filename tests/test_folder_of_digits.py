"""A folder of images made from digits: in memory and streamed, its sweep ends as the embedded set's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffult_ray import files
from tests.conftest import MEASURED, TINY

pytestmark = pytest.mark.slow

ONE_CELL = TINY[: TINY.index("baselines:")] + """
tracking: {enabled: false}
search:
  - {method: {grid: [ce, oversample, diffult]}}
"""
DIGITS = "{name: digits, imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}"
FOLDER = (
    "{{name: folder, root: '{root}', loading: {loading}, image_size: 8, profile: exp, test_per_class: 50, "
    "imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}}"
)
NOT_RESULTS = ["trial", *MEASURED, "generator", "pool", "error"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / "train" / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def results(new_door, root):
    def run(dataset: str) -> tuple[pd.DataFrame, Path]:
        door = new_door(ONE_CELL.replace(DIGITS, dataset))
        done = door.run()
        assert done.returncode == 0, done.stdout + done.stderr
        sweep = door.storage / "sweeps" / "tiny"
        assert (sweep / "report.html").exists()
        return pd.read_parquet(sweep / "results.parquet"), door.storage

    assert DIGITS in ONE_CELL
    sets = {how: FOLDER.format(root=root, loading=how) for how in ("memory", "stream")}
    return {name: run(dataset) for name, dataset in {"digits": DIGITS, **sets}.items()}


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_same_results(results, loading):
    (ours, _), (expected, _) = results[loading], results["digits"]
    assert len(expected) == 3 and (expected["status"] == "done").all()
    pd.testing.assert_frame_equal(ours.drop(columns=NOT_RESULTS), expected.drop(columns=NOT_RESULTS))


def test_streamed_means_streamed(results):
    for loading, (_, storage) in results.items():
        (split,) = (storage / "artifacts" / "split").iterdir()
        assert files.read_json(split / "split.json")["streamed"] == (loading == "stream")
        pixels = {p.name for p in split.glob("*.safetensors")}
        assert bool(pixels) == (loading != "stream")


CROPS = """
name: crops
experiment:
  dataset: {{name: folder, root: '{root}', loading: stream, image_size: 16, profile: exp, test_per_class: 30,
            imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}}
  extractor: &recipe {{architecture: cnn, steps: 60, batch_size: 32, augmentation: resized_crop, jitter: 0.4}}
  generator: {{channels: [16, 32], blocks: 1, attention: [], steps: 20, batch_size: 32, warmup_steps: 5}}
  generation: {{per_class: 30, sampler: heun, steps: 3}}
  classifier: *recipe
  quality: {{images: 100, reference: *recipe}}
  resources: {{extractor: {{readers: {readers}}}, classifier: {{readers: {readers}}}}}
tracking: {{enabled: false}}
search:
  - {{method: {{grid: [mixup]}}, synthetic: {{grid: [false, true]}}}}
  - {{method: {{grid: [ce, diffult]}}}}
"""


@pytest.fixture(scope="module")
def photographs(root, tmp_path_factory) -> Path:
    """The digits in colour, each of a size of its own."""
    folder, drawn = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for path in sorted(root.glob("train/*/*.png")):
        grey = np.asarray(Image.open(path).resize(drawn.integers(20, 60, size=2)))
        tinted = grey[:, :, None] * drawn.uniform(0.6, 1.0, size=3)
        there = folder / path.relative_to(root)
        there.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tinted.astype(np.uint8)).save(there)
    return folder


def test_a_sweep_on_crops_of_streamed_images_ends_alike_whoever_reads_them(new_door, photographs):
    found = []
    for readers in (1, 2):
        door = new_door(CROPS.format(root=photographs, readers=readers))
        done = door.run()
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(pd.read_parquet(door.storage / "sweeps" / "crops" / "results.parquet"))
    one, two = (each.drop(columns=MEASURED) for each in found)
    assert len(one) == 4 and (one["status"] == "done").all()
    assert sorted(one["generated"] > 0) == [False, False, True, True]
    pd.testing.assert_frame_equal(one, two)
