"""The split as one object: the digits' are pinned, and what is saved is what is loaded."""

import hashlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from diffult_ray import files
from diffult_ray.config import Dataset
from diffult_ray.data import load_split, make_split, save_split
from diffult_ray.data import pixels as reading
from diffult_ray.data.decode import decode
from diffult_ray.errors import BadInput
from diffult_ray.pipeline import Place, split
from diffult_ray.stages import Order
from diffult_ray.stages.split import build
from tests.data_files import encoded, picture, write, write_folder

PARTS = ("train", "validation", "test", "balanced")
COUNTS = {"train": {"ant": 8, "bee": 5, "cat": 2}, "test": {"ant": 2, "bee": 2, "cat": 2}}


def checksum(found):
    digest = hashlib.sha256()
    for part in PARTS:
        for name in ("images", "labels", "source"):
            array = getattr(getattr(found, part), name)
            digest.update(str((part, name, array.shape, str(array.dtype))).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("values", "expected"), [
    ({"imbalance_factor": 50, "max_per_class": 120, "validation_per_class": 8},
     "1a56905caf9a48786138f5c3f31da225ff2016e82e88fe30761559a93052a7b6"),
    ({"imbalance_factor": 20, "max_per_class": 100, "image_size": 16, "seed": 3},
     "ba9877f8472be13dca10034557db64db9212cf7dde7c9e0cc9ec698bd93e6694"),
])
def test_digits_are_pinned(values, expected, tmp_path):
    """Every bit as on the day when the shipped sweep's results were written."""
    made = make_split(Dataset(name="digits", **values))
    assert checksum(made) == expected
    assert checksum(make_split(SimpleNamespace(name="digits", **values))) == expected
    save_split(made, tmp_path)
    assert checksum(load_split(tmp_path)) == expected


@pytest.mark.parametrize(("values", "message"), [
    ({"max_per_class": 500}, r"class 0 of digits has \d+ images beside test and validation .got '500, which"),
    ({"max_per_class": 20, "imbalance_factor": 50}, "dataset.imbalance_factor: leaves a class without"),
    ({"validation_per_class": 400}, "50 for test and 400 for validation a class leave no training image"),
    ({"test_per_class": 400}, "dataset.test_per_class: 400 for test a class leave no training image"),
])
def test_digits_that_cannot_be(values, message):
    with pytest.raises(BadInput, match=message):
        make_split(Dataset(**{"max_per_class": 100, **values}))


def test_digits_of_three_channels():
    grey, colour = (make_split(Dataset(max_per_class=100, channels=c)) for c in (None, 3))
    assert colour.channels == 3
    np.testing.assert_array_equal(colour.test.images, grey.test.images.repeat(3, axis=1))


# --- streamed -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", COUNTS)


def section(root, **values):
    return Dataset(name="folder", root=str(root), **{"image_size": 8, **values})


def test_memory_and_stream_are_the_same_images(folder):
    memory, stream = (make_split(section(folder, loading=how)) for how in ("memory", "stream"))
    assert (memory.streamed, stream.streamed) == (False, True)
    assert (stream.channels, stream.image_size, stream.counts) == (3, 8, [8, 5, 2])
    for part in PARTS:
        kept = getattr(stream, part)
        assert kept.images is None and len(kept.paths) == len(kept.rows) == len(kept)
        for name in ("labels", "source"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(getattr(memory, part), name))
        every = np.arange(len(kept))
        np.testing.assert_array_equal(stream.pixels(part, every), memory.pixels(part, every))
    some = np.array([4, 0, 4])
    for data, image in zip(stream.encoded("train", some), memory.train.images[some], strict=True):
        np.testing.assert_array_equal(decode(data, channels=3, image_size=8), image)


def test_auto_streams_what_is_too_large_for_memory(folder, monkeypatch):
    assert not make_split(section(folder)).streamed
    monkeypatch.setattr(reading, "MEMORY_BYTES", 21 * 3 * 64 - 1)
    assert make_split(section(folder)).streamed
    monkeypatch.setattr(reading, "MEMORY_BYTES", 21 * 3 * 64)
    assert not make_split(section(folder)).streamed


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_saved_and_loaded(folder, tmp_path, loading):
    made = make_split(section(folder, loading=loading, profile="step", max_per_class=2, imbalance_factor=2))
    save_split(made, tmp_path / "out")
    found = load_split(tmp_path / "out")
    for part in PARTS:
        for name in ("images", "labels", "source", "paths", "rows"):
            ours, theirs = getattr(getattr(found, part), name), getattr(getattr(made, part), name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype
    assert (found.class_names, found.counts) == (made.class_names, [2, 1, 1])
    assert found.streamed == (loading == "stream")
    assert found.facts == made.facts
    assert (found.channels, found.image_size) == (3, 8)


def test_a_streamed_split_holds_no_pixels_and_moves_with_its_data(folder, tmp_path):
    made = make_split(section(folder, loading="stream"))
    save_split(made, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["split.json", "split.parquet"]
    facts = files.read_json(tmp_path / "out" / "split.json")
    assert facts["root"] == str(folder) and facts["fingerprint"] == made.facts["fingerprint"]
    assert not any(path.startswith("/") for path in made.train.paths)
    before = made.pixels("train", np.arange(3))
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        load_split(tmp_path / "out").pixels("train", np.arange(3))
    found = load_split(tmp_path / "out", root=str(moved))
    np.testing.assert_array_equal(found.pixels("train", np.arange(3)), before)


def test_a_natural_set_is_stored_once(folder, tmp_path):
    save_split(make_split(section(folder)), tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["split.json", "test.safetensors", "train.safetensors", "validation.safetensors"]
    found = load_split(tmp_path / "out")
    assert found.balanced is found.train


READING = """
import sys, torch, safetensors.torch
from diffult_ray.data import load_split
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
start = resident()
split = load_split(sys.argv[1])
assert split.train.images.sum() == 128 and split.balanced.images.shape == (400_000, 1, 16, 16)
loaded = resident()
assert split.balanced.images.sum() == 400_000 * 256
print(loaded - start, resident() - loaded)
"""


def test_loading_reads_only_what_is_used(tmp_path):
    from diffult_ray.data.split import Part, Split

    small, large = (
        Part(np.ones((n, 1, size, size), np.uint8), np.zeros(n, np.int64), np.arange(n))
        for n, size in ((2, 8), (400_000, 16))
    )
    save_split(Split("digits", ["a"], small, small, small, large), tmp_path)
    told = subprocess.check_output([sys.executable, "-c", READING, tmp_path], text=True)
    used, rest = map(int, told.split())
    assert used < 20e6 and rest > 80e6  # of the 102 MB of pixels


# --- the stage ----------------------------------------------------------------------------------


def order_of(config, tmp_path):
    from diffult_ray.config import Experiment

    stage = split(Experiment(dataset=config, select="test"))
    return Order(dict(stage.config), {}, tmp_path / "out", tmp_path / "work"), stage


def test_stage_tells_what_was_skipped(folder, tmp_path):
    write(folder / "train/ant/bad.png", b"no image")
    config = section(folder, on_error="skip", loading="stream")
    order, stage = order_of(config, tmp_path)
    build([order], stage.resources)
    summary = files.read_json(tmp_path / "out" / "summary.json")
    assert summary["skipped_images"] == 1 and summary["train_images"] == 15 and summary["streamed"]
    assert load_split(tmp_path / "out").facts["skipped"]["first"] == [
        "train/ant/bad.png is not a JPEG, PNG, WebP or BMP image"]


def test_key_is_the_contents_not_the_place(tmp_path):
    from diffult_ray.config import Experiment

    roots = [write_folder(tmp_path / name, COUNTS) for name in ("a", "b", "c")]
    write(roots[2] / "train/ant/000.png", encoded(picture(8, size=(50, 50))))
    stages = [split(Experiment(dataset=section(r, loading=how), select="test"))
              for r, how in zip(roots, ("memory", "stream", "memory"), strict=True)]
    assert stages[0].key == stages[1].key != stages[2].key
    assert stages[1].resources == Place(str(roots[1]), False, "stream")
    assert not {"root", "download", "loading"} & set(stages[0].config)


def test_data_that_change_while_the_sweep_starts(folder, tmp_path):
    order, stage = order_of(section(folder), tmp_path)
    write(folder / "train/ant/more.png", encoded(picture(99)))
    with pytest.raises(BadInput, match="the data changed while the sweep was starting"):
        build([order], stage.resources)


def test_no_ray_behind_the_data():
    code = "import sys, diffult_ray.data, diffult_ray.data.sources, diffult_ray.data.augment\n" \
           "import diffult_ray.data.batches, diffult_ray.data.__main__\n" \
           "sys.exit(bool({'ray', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_selecting_by_validation_needs_a_part_for_it(folder, tmp_path, capsys):
    from diffult_ray.sweep import main

    sweep = tmp_path / "s.yaml"
    sweep.write_text(f"""
name: without
experiment:
  dataset: {{name: folder, root: "{folder}", image_size: 8}}
  select: validation
""")
    assert main([str(sweep), "tracking.enabled=false", "--storage", str(tmp_path / "store")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: experiment.dataset.validation_per_class: ") and told.count("\n") == 1
    assert "the set has no validation part" in told
    assert not (tmp_path / "store" / "sweeps").exists()
