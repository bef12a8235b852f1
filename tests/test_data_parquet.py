"""Parquet files of encoded images: Hugging Face's layout and plain bytes, read by row group."""

import dataclasses
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffult_ray.config import Dataset
from diffult_ray.data import make_split, paths
from diffult_ray.data.encoded import read_bytes
from diffult_ray.data.parquet import part_of
from diffult_ray.data.sources import SOURCES, identity
from diffult_ray.errors import BadInput
from tests.buckets import bucket, storage_server  # noqa: F401  fixtures
from tests.data_files import encoded, picture, write, write_parquet

IMAGES = [encoded(picture(i, size=(8, 8))) for i in range(12)]
LABELS = [0, 1, 0, 1, 1, 0, 2, 0, 1, 0, 0, 2]


def section(root, **values):
    return Dataset(name="parquet", root=str(root), **{"image_size": 8, **values})


def write_hugging_face(root, **options):
    """data/train in two files, and a test file."""
    write_parquet(root / "data/train-00000-of-00002.parquet", IMAGES[:7], LABELS[:7], **options)
    write_parquet(root / "data/train-00001-of-00002.parquet", IMAGES[7:], LABELS[7:], **options)
    write_parquet(root / "data/test-00000-of-00001.parquet", IMAGES[:3], [0, 1, 2], **options)
    return root


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_pixels_belong_to_their_labels(tmp_path, struct, loading):
    root = write_hugging_face(tmp_path, struct=struct, names=["ant", "bee", "cat"])
    split = make_split(section(root, loading=loading))
    assert split.class_names == ["ant", "bee", "cat"] and split.counts == [6, 4, 2]
    expected = [np.asarray(picture(i, size=(8, 8))).transpose(2, 0, 1) for i in split.train.source]
    np.testing.assert_array_equal(split.pixels("train", np.arange(12)), expected)
    np.testing.assert_array_equal(split.train.labels, np.array(LABELS)[split.train.source])
    assert len(split.test) == 3 and split.streamed == (loading == "stream")


def test_a_uri_and_other_columns(tmp_path):
    root = write_hugging_face(tmp_path, image="img", label="fine_label")
    columns = {"image": "img", "label": "fine_label"}
    split = make_split(section(root.as_uri(), columns=columns, loading="stream"))
    assert split.facts["root"] == root.as_uri() and split.class_names == ["0", "1", "2"]
    assert split.pixels("test", np.array([2])).shape == (1, 3, 8, 8)
    assert identity(section(root.as_uri(), columns=columns)) == identity(section(root, columns=columns))


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_in_a_bucket(bucket, tmp_path, loading):  # noqa: F811
    root = write_hugging_face(tmp_path)
    for file in root.rglob("*.parquet"):
        bucket.write(file.relative_to(root).as_posix(), file.read_bytes())
    split = make_split(section(bucket.uri, loading=loading))
    here = make_split(section(root, loading=loading))
    for part in ("train", "test"):
        all_of_it = np.arange(len(getattr(here, part)))
        np.testing.assert_array_equal(split.pixels(part, all_of_it), here.pixels(part, all_of_it))
    assert identity(section(bucket.uri)) == identity(section(root))


@pytest.mark.parametrize("missing", ["bucket", "where"])
def test_a_bucket_or_what_it_holds_is_missing(bucket, missing):  # noqa: F811
    name = {"bucket": bucket.name}.get(missing, missing)
    with pytest.raises(BadInput, match="dataset.root: cannot be read"):
        make_split(section(bucket.uri.replace(name, "no-such")))


def test_a_server_that_does_not_answer(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(paths, "RETRIES", 2)
    begin = time.monotonic()
    with pytest.raises(BadInput, match="dataset.root: cannot be read"):
        make_split(section(dataclasses.replace(bucket, server="http://127.0.0.1:9").explicit))
    assert time.monotonic() - begin < 30


def test_credentials_of_google_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(BadInput, match="dataset.root: cannot be read: Cannot open credentials file"):
        make_split(section("gs://bucket/p"))


def test_one_file_is_a_root(tmp_path):
    path = write_parquet(tmp_path / "birds.parquet", IMAGES, LABELS)
    split = make_split(section(path, test_per_class=1, loading="stream"))
    assert split.counts == [5, 3, 1] and set(split.train.paths) == {""}
    assert split.encoded("train", np.array([0])) == [IMAGES[split.train.rows[0]]]


class Counting:
    """Counts the row groups that pass through pyarrow's reader."""

    def __init__(self, monkeypatch):
        self.groups, self.iter_batches = [], pq.ParquetFile.iter_batches
        monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda file, **o: self(file, **o))

    def __call__(self, file, **options):
        self.groups += options["row_groups"]
        return self.iter_batches(file, **options)


def test_each_needed_row_group_is_read_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", IMAGES, LABELS, rows=3)
    counting = Counting(monkeypatch)
    rows = np.array([11, 0, 10, 2, 0])
    found = read_bytes(str(tmp_path), np.full(5, "a.parquet", object), rows)
    assert found == [IMAGES[r] for r in rows] and counting.groups == [0, 3]


def test_files_and_rows_together_keep_their_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", IMAGES[:4], LABELS[:4])
    write(tmp_path / "b.png", IMAGES[9])
    paths = np.array(["a.parquet", "b.png", "a.parquet"], object)
    assert read_bytes(str(tmp_path), paths, np.array([3, -1, 1])) == [IMAGES[3], IMAGES[9], IMAGES[1]]


def test_a_row_beyond_the_end(tmp_path):
    write_parquet(tmp_path / "a.parquet", IMAGES, LABELS)
    with pytest.raises(ValueError, match="row 12 is beyond the file's 12 rows"):
        read_bytes(str(tmp_path), np.array(["a.parquet"], object), np.array([12]))


def test_faulty_rows(tmp_path):
    images = [*IMAGES, None, b"no image", IMAGES[0], IMAGES[0]]
    labels = [*LABELS, 0, 1, None, -4]
    root = write_parquet(tmp_path / "train.parquet", images, labels).parent
    with pytest.raises(BadInput) as refused:
        make_split(section(root, test_per_class=1))
    told = str(refused.value)
    assert "4 of 16 images are faulty" in told and "\n" not in told
    for line in ("train.parquet row 12 has no image",
                 "train.parquet row 13 is not a JPEG", "row 14 has no label", "row 15 has a label outside"):
        assert line in told
    split = make_split(section(root, test_per_class=1, on_error="skip"))
    assert split.facts["skipped"]["n"] == 4 and split.counts == [5, 3, 1]


@pytest.mark.parametrize(("make", "values", "message"), [
    (lambda r: r.mkdir(), {}, "dataset.root: has no .parquet file"),
    (lambda r: None, {}, "dataset.root: cannot be read"),
    (lambda r: write(r / "train.parquet", b"PAR1half"), {}, "train.parquet: is not a readable parquet file"),
    (write_hugging_face, {"columns": {"image": "img"}}, "has no column 'img', only image, label"),
    (write_hugging_face, {"columns": {"image": "label"}}, "'label' holds binary or a struct.*got 'int64'"),
    (write_hugging_face, {"columns": {"label": "image"}}, "'image' holds whole numbers"),
    (lambda r: write_parquet(r / "test.parquet", IMAGES, LABELS), {}, "name begins with train"),
    (lambda r: [write_hugging_face(r), write_parquet(r / "more.parquet", IMAGES, LABELS)], {},
     "files of no part: more.parquet"),
])
def test_wrong_layout(tmp_path, make, values, message):
    make(tmp_path / "root")
    with pytest.raises(BadInput, match=message) as refused:
        make_split(section(tmp_path / "root", **values))
    assert "\n" not in str(refused.value)


def test_unknown_scheme(tmp_path):
    with pytest.raises(BadInput, match="is a local path or a URI that pyarrow opens"):
        make_split(section("nothing://bucket/path"))


@pytest.mark.parametrize(("path", "part"), [
    ("data/train-00000-of-00002.parquet", "train"), ("validation/0.parquet", "validation"),
    ("val.parquet", "validation"), ("default/test/0.parquet", "test"), ("trainers.parquet", None),
    ("a.parquet", None),
])
def test_part_of(path, part):
    assert part_of(path) == part


def test_identity_changes_with_a_file(tmp_path):
    root = write_hugging_face(tmp_path)
    first = identity(section(root))
    assert first == make_split(section(root)).facts["fingerprint"]
    write_parquet(root / "data/test-00000-of-00001.parquet", IMAGES[:6], [0, 1, 2, 0, 1, 2])
    assert SOURCES["parquet"].identity(section(root)) != first
