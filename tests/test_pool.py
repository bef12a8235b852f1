"""The generated pool as files that other tools open."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffult_ray.stages import SHARED, pool
from diffult_ray.stages.dataflow import read_parts, without, write_part

SCHEMA = pool.hugging_face_metadata(pool.IMAGE_SCHEMA)


def table(counts, seed=0, channels=1):
    rows = pool.requests(counts, seed)
    images = np.random.default_rng(0).integers(0, 256, (rows.num_rows, channels, 8, 8), dtype=np.uint8)
    column = pa.array(pool.encode(images), type=pool.IMAGE)
    return rows.append_column("image", column).cast(SCHEMA), images


@pytest.mark.parametrize("channels", [1, 3])
def test_images_survive_the_png(channels):
    _, images = table([3, 2], channels=channels)
    assert np.array_equal(pool.decode(pool.encode(images)), images)


def test_a_request_depends_on_class_and_id_only():
    few, many = pool.requests([2, 0, 3], seed=7), pool.requests([4, 1, 5], seed=7)
    key = {(r["label"], r["id"]): r["seed"] for r in many.to_pylist()}
    assert all(key[r["label"], r["id"]] == r["seed"] for r in few.to_pylist())
    assert len(set(key.values())) == 10
    assert pool.requests([2], seed=8)["seed"] != pool.requests([2], seed=7)["seed"]


def test_the_pool_opens_in_pandas_with_real_images_and_hugging_face_features(tmp_path):
    import pandas as pd

    made, images = table([2, 3])
    pool.write_pool(made, tmp_path / "pool")
    frame = pd.read_parquet(tmp_path / "pool")
    assert frame["label"].tolist() == [0, 0, 1, 1, 1]
    shown = np.asarray(Image.open(io.BytesIO(frame["image"][4]["bytes"])))
    assert np.array_equal(shown, images[4, 0])
    metadata = pq.read_schema(next((tmp_path / "pool").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


def test_parts_come_back_sorted_and_each_image_once(tmp_path):
    made, _ = table([3, 4])
    write_part(SHARED, tmp_path, made.slice(4, 3))
    write_part(SHARED, tmp_path, made.slice(0, 5))  # one image again, as after a killed actor
    assert read_parts(tmp_path, SCHEMA).equals(made)
    assert without(made, made.slice(0, 5)).equals(made.slice(5))


def test_an_empty_pool_is_a_pool(tmp_path):
    pool.write_pool(SCHEMA.empty_table(), tmp_path / "pool")
    assert pq.read_table(tmp_path / "pool").num_rows == 0
