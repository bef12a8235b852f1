"""List files in the layouts of ImageNet-LT, Places-LT and iNaturalist-2018, and their slips."""

import os

import numpy as np
import pytest

from diffult_ray.config import Dataset
from diffult_ray.data import make_split
from diffult_ray.data.sources import SOURCES, identity
from diffult_ray.errors import BadInput
from tests.data_files import encoded, picture, write

IMAGENET = {
    "train": ["train/n01440764/n01440764_10026.JPEG 0", "train/n01440764/n01440764_10027.JPEG 0",
              "train/n01443537/n01443537_1.JPEG 1"],
    "val": ["val/ILSVRC2012_val_00000001.JPEG 1"],
    "test": ["val/ILSVRC2012_val_00000002.JPEG 0", "val/ILSVRC2012_val_00000003.JPEG 1"],
}
PLACES = {
    "train": ["data_256/a/airfield/00000001.jpg 0", "data_256/a/alley/00000002.jpg 1"],
    "val": ["val_256/Places365_val_00000001.jpg 0"],
    "test": ["val_256/Places365_val_00000002.jpg 1"],
}
INATURALIST = {
    "train": ["train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg 0",
              "train_val2018/Aves/2820/a b.jpg 1"],
    "val": ["train_val2018/Aves/2820/c.jpg 1"],
}


def write_lists(root, lists, made=True):
    """The list files, and an image for every line that names one inside the root."""
    for name, lines in lists.items():
        write(root / f"{name}.txt", "".join(f"{line}\n" for line in lines).encode())
        for number, line in enumerate(lines if made else ()):
            image = encoded(picture(number, size=(16, 12)), "JPEG")
            write(root / line.rsplit(maxsplit=1)[0], image)
    return root


def section(root, **values):
    names = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
    there = {part: name for part, name in names.items() if (root / name).exists()}
    return Dataset(name="lists", root=str(root), **{"lists": there, "image_size": 8, **values})


@pytest.mark.parametrize("lists", [IMAGENET, PLACES])
def test_layouts(tmp_path, lists):
    split = make_split(section(write_lists(tmp_path, lists)))
    for part, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        labels = [int(line.split()[-1]) for line in lists[name]]
        found = getattr(split, part)
        assert sorted(found.labels) == sorted(labels) and len(found.images) == len(labels)
        np.testing.assert_array_equal(found.labels, np.array(labels)[found.source])
    assert split.class_names == ["0", "1"]


def test_inaturalist_streams(tmp_path):
    split = make_split(section(write_lists(tmp_path, INATURALIST), loading="stream", validation_per_class=0,
                               lists={"train": "train.txt", "test": "val.txt"}))
    assert split.streamed and set(split.train.paths) == {
        "train_val2018/Plantae/7477/3b60c9486db1d2ee875f11a669fbde4a.jpg", "train_val2018/Aves/2820/a b.jpg"}
    assert split.train.rows.tolist() == [-1, -1]


def test_names(tmp_path):
    root = write_lists(tmp_path, IMAGENET)
    write(root / "names.txt", b"tench\ngoldfish\n")
    lists = {"train": "train.txt", "test": "test.txt", "names": "names.txt"}
    assert make_split(section(root, lists=lists)).class_names == ["tench", "goldfish"]
    write(root / "names.txt", b"tench\n")
    with pytest.raises(BadInput, match=r"train.txt line 3, .*, has a label outside 0..0: 1"):
        make_split(section(root, lists=lists))


FAULTS = {
    "train/a.jpg": "train.txt line 4, train/a.jpg, has no label",
    "train/a.jpg one": "train.txt line 4, train/a.jpg, has a label that is not a whole number: 'one'",
    "train/a.jpg 1.0": "has a label that is not a whole number: '1.0'",
    "train/a.jpg nan": "has a label that is not a whole number: 'nan'",
    "train/a.jpg ²": "has a label that is not a whole number",
    "train/a.jpg -1": "has a label outside 0..1048575: -1",
    "train/a.jpg 99999999999999999999": "has a label outside 0..1048575",
    "../a.jpg 0": "train.txt line 4, ../a.jpg, has '..' in its path",
    "train/../../a.jpg 0": "has '..' in its path",
    "/etc/passwd 0": "train.txt line 4, /etc/passwd, is an absolute path",
    "link/a.jpg 0": "train.txt line 4, link/a.jpg, is a link that leads out of the root",
    "train/none.jpg 0": "train/none.jpg cannot be read: No such file or directory",
    "train 0": "train cannot be read: Is a directory",
}


@pytest.mark.parametrize("line", FAULTS)
def test_faulty_line(tmp_path, line):
    root = write_lists(tmp_path / "root", IMAGENET)
    write(tmp_path / "away" / "a.jpg", encoded(picture(1)))
    os.symlink(tmp_path / "away", root / "link")
    with open(root / "train.txt", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(BadInput) as refused:
        make_split(section(root))
    assert FAULTS[line] in str(refused.value) and "1 of 7 images are faulty" in str(refused.value)
    split = make_split(section(root, on_error="skip"))
    assert split.facts["skipped"]["n"] == 1 and split.counts == [2, 1]


def test_blank_lines_are_no_lines(tmp_path):
    root = write_lists(tmp_path, IMAGENET)
    write(root / "train.txt", b"\n" + (root / "train.txt").read_bytes() + b"  \n\n")
    assert make_split(section(root)).counts == [2, 1]


@pytest.mark.parametrize(("lines", "message"), [
    ({"train": IMAGENET["train"], "test": ["val/x.jpg 2"]}, "1 of 3 classes of test that training lacks: 2"),
    ({"train": ["a.jpg 0", "b.jpg 2"], "test": ["c.jpg 0"]}, "1 of 3 classes without a training image: 1"),
    ({"train": [], "test": ["c.jpg 0"]}, "train.txt: names no training image"),
])
def test_classes(tmp_path, lines, message):
    with pytest.raises(BadInput, match=message):
        make_split(section(write_lists(tmp_path, lines)))


@pytest.mark.parametrize(("name", "message"), [
    ("none.txt", "dataset.lists.test: no such file in"),
    ("../test.txt", "dataset.lists.test: is a file under dataset.root: it has '..' in its path"),
    ("/etc/passwd", "it is an absolute path"),
])
def test_list_file_elsewhere(tmp_path, name, message):
    root = write_lists(tmp_path, IMAGENET)
    with pytest.raises(BadInput, match=message):
        make_split(section(root, lists={"train": "train.txt", "test": name}))


def test_list_that_is_no_text(tmp_path):
    root = write_lists(tmp_path, IMAGENET)
    write(root / "train.txt", b"\xff\xfe\x00a")
    with pytest.raises(BadInput, match="is not a readable UTF-8 text file"):
        make_split(section(root))


def test_identity_is_of_lists_and_images(tmp_path):
    root = write_lists(tmp_path, IMAGENET)
    first = identity(section(root))
    assert first == make_split(section(root)).facts["fingerprint"]
    write(root / IMAGENET["train"][0].split()[0], encoded(picture(50, size=(90, 90)), "JPEG"))
    second = SOURCES["lists"].identity(section(root))
    write(root / "test.txt", b"val/ILSVRC2012_val_00000002.JPEG 1\n")
    assert len({first, second, SOURCES["lists"].identity(section(root))}) == 3
