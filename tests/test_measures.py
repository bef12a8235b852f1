"""What the quality stage makes of the features that its actors send, in whichever order."""

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from diffult_ray import files
from diffult_ray.method.quality import frechet_distance, kid, moments_of, precision_recall
from diffult_ray.stages import Order, quality

D, CLASSES = 3, 4
CONFIG = {
    "network": "reference", "images": 60, "neighbours": 2, "kid_subsets": 4, "kid_subset_size": 10,
    "generation": {"seed": 0},
}


@pytest.fixture
def order(tmp_path):
    """A split of 4 classes, of which the last has five real images, and a network's features of it."""
    labels = np.repeat(np.arange(CLASSES), [20, 20, 20, 5])
    features = np.random.default_rng(0).normal(size=(len(labels), D)).astype(np.float32)
    for name in ("split", "reference"):
        (tmp_path / name).mkdir()
    images = np.zeros((len(labels), 1, 8, 8), np.uint8)
    arrays = {"images": images, "labels": labels, "source": np.arange(len(labels))}
    for part in ("train", "validation", "test", "balanced"):
        save_file(arrays, tmp_path / "split" / f"{part}.safetensors")
    files.write_json(tmp_path / "split" / "split.json", {
        "name": "x", "class_names": list("abcd"), "streamed": False, "channels": 1, "image_size": 8,
        "stored": ["train", "validation", "test", "balanced"],
    })
    save_file({"features": features}, tmp_path / "reference" / "features.safetensors")
    inputs = {name: tmp_path / name for name in ("split", "reference")}
    return Order(CONFIG, inputs, tmp_path / "out", tmp_path / "work")


def measured(order, wanted, blocks):
    """The summary of the features of `wanted` that come in these blocks of rows."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(wanted.num_rows, D)).astype(np.float32) + 0.5
    logits = rng.normal(size=(wanted.num_rows, CLASSES)).astype(np.float32)
    table = wanted
    for name, values in (("features", features), ("logits", logits)):
        table = table.append_column(name, pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1]))
    real = quality.Real(order.inputs["reference"], order.inputs["split"])
    measures = quality.Measures(wanted, real)
    for rows in blocks:
        measures.update(table.take(rows))
    quality._finish(order, measures)
    return files.read_json(order.out / "summary.json"), features, real


def test_a_summary_does_not_depend_on_the_order_of_the_blocks(order):
    wanted = quality._wanted(order)
    one, features, real = measured(order, wanted, [np.arange(60)])
    shuffled = np.random.default_rng(2).permutation(60)
    many, *_ = measured(order, wanted, np.array_split(shuffled, 7))
    assert one == many
    by_seed = features[np.argsort(wanted["seed"].to_numpy())]
    fid = frechet_distance(moments_of(features), moments_of(real.features))
    assert one["fid"] == pytest.approx(fid, rel=1e-8)
    assert one["kid"] == pytest.approx(kid(by_seed, real.features, subsets=4, subset_size=10)[0], rel=1e-8)
    expected = precision_recall(features, real.features, neighbours=2)
    assert (one["precision"], one["recall"]) == pytest.approx(expected, rel=1e-8)
    assert one["images"] == 60 and one["real_images"] == 65 and one["sampled_images"] == [60, 65]
    assert one["notes"] == []


def test_a_class_has_a_fid_where_both_sides_have_two_images_a_dimension(order):
    wanted = quality._wanted(order)
    found, features, real = measured(order, wanted, [np.arange(60)])
    own = wanted["label"].to_numpy() == 1
    expected = frechet_distance(moments_of(features[own]), moments_of(real.features[real.labels == 1]))
    assert found["per_class_fid"][1] == pytest.approx(expected, rel=1e-8)
    assert found["per_class_fid"][0] is not None and found["per_class_fid"][3] is None  # five real ones


def test_kid_and_precision_are_of_a_bounded_sample_that_the_seeds_choose(order, monkeypatch):
    monkeypatch.setattr(quality, "SAMPLE", 12)
    wanted = quality._wanted(order)
    found, features, real = measured(order, wanted, np.array_split(np.arange(60), 5))
    assert found["images"] == 60 and found["sampled_images"] == [12, 12]
    chosen = np.argsort(wanted["seed"].to_numpy())[:12]
    expected = precision_recall(features[chosen], real.sample, neighbours=2)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, rel=1e-8)
