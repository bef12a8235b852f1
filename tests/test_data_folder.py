"""A folder of images: what it gives, and every way in which it can be wrong."""

import os

import numpy as np
import pytest

from diffult_ray.config import Dataset
from diffult_ray.data import make_split
from diffult_ray.data.sources import SOURCES, identity
from diffult_ray.errors import BadInput
from tests.data_files import encoded, picture, write, write_folder

COUNTS = {"train": {"ant": 8, "bee": 5, "cat": 2}, "test": {"ant": 2, "bee": 2, "cat": 2}}


def section(root, **values):
    return Dataset(name="folder", root=str(root), **{"image_size": 8, **values})


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, COUNTS)


def test_taken_as_it_comes(folder):
    split = make_split(section(folder))
    assert split.class_names == ["ant", "bee", "cat"] and split.counts == [8, 5, 2]
    assert split.train.images.shape == (15, 3, 8, 8) and split.channels == 3
    assert split.balanced is split.train and len(split.validation) == 0 and len(split.test) == 6
    assert split.facts["notes"] == [] and split.facts["skipped"] == {"n": 0, "first": []}


def test_pixels_are_pillows(folder):
    from PIL import Image

    split = make_split(section(folder))
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("train/*/*"))
    for image, label, source in zip(split.train.images, split.train.labels, split.train.source, strict=True):
        theirs = Image.open(folder / names[source])
        left = (theirs.width * 8 // theirs.height - 8) // 2 + (theirs.width * 8 % theirs.height > 5)
        assert names[source].split("/")[1] == split.class_names[label]
        theirs = theirs.resize((10, 8), Image.Resampling.BILINEAR).crop((left, 0, left + 8, 8))
        np.testing.assert_array_equal(image, np.asarray(theirs).transpose(2, 0, 1))


def test_validation_folder_is_used_whole(folder):
    for name in ("val", "validation"):
        root = folder / name
        write_folder(root, {**COUNTS, name: {"ant": 3, "cat": 1}})
        assert np.bincount(make_split(section(root)).validation.labels).tolist() == [3, 0, 1]


def test_a_test_set_is_held_out_and_said(tmp_path):
    root = write_folder(tmp_path, {"train": {"ant": 20, "bee": 10}})
    split = make_split(section(root))
    assert np.bincount(split.test.labels).tolist() == [2, 2] and split.counts == [18, 8]
    assert split.facts["notes"] == ["test: 2 images a class held out of train"]
    split = make_split(section(root, test_per_class=4, validation_per_class=3))
    assert np.bincount(split.test.labels).tolist() == [4, 4]
    assert np.bincount(split.validation.labels).tolist() == [3, 3] and split.counts == [13, 3]
    parts = [set(getattr(split, p).source) for p in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30


def test_hold_out_leaves_every_class_an_image(tmp_path):
    root = write_folder(tmp_path, {"train": {"ant": 9, "bee": 4}})
    with pytest.raises(BadInput, match="4 for test a class leave no training image of bee; lower it"):
        make_split(section(root, test_per_class=4))


def test_a_profile_may_be_cut(folder):
    split = make_split(section(folder, profile="step", max_per_class=2, imbalance_factor=2))
    assert split.counts == [2, 1, 1] and len(split.balanced) == 6
    with pytest.raises(BadInput, match="class bee of folder has 5 images beside test and validation"):
        make_split(section(folder, profile="exp", max_per_class=8, imbalance_factor=1))
    with pytest.raises(BadInput, match="leaves a class without a training image"):
        make_split(section(folder, profile="exp", max_per_class=4, imbalance_factor=50))


def test_grey_is_found(tmp_path):
    root = write_folder(tmp_path, COUNTS, channels=1)
    assert make_split(section(root)).channels == 1
    assert make_split(section(root, channels=3)).train.images.shape[1] == 3
    write(root / "train" / "ant" / "005.png", encoded(picture(9)))
    assert make_split(section(root)).channels == 3


# --- groups -------------------------------------------------------------------------------------


def write_tracks(root, tracks=6, frames=3, classes=("ant", "bee")):
    for c, name in enumerate(classes):
        for track in range(tracks):
            for frame in range(frames):
                path = root / "train" / name / f"t{c}{track}_{frame}.png"
                write(path, encoded(picture(100 * c + track)))
    return root


def tracks_of(split, root, part):
    names = sorted(p.relative_to(root).as_posix() for p in root.glob("train/*/*"))
    return {names[s].split("/")[2].split("_")[0] for s in getattr(split, part).source}


def test_a_group_stays_on_one_side(tmp_path):
    root = write_tracks(tmp_path)
    rules = {"group_pattern": r"^(t\d+)_", "test_per_class": 4, "validation_per_class": 2}
    split = make_split(section(root, **rules))
    sides = [tracks_of(split, root, p) for p in ("train", "validation", "test")]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 12
    assert np.bincount(split.test.labels).tolist() == [4, 4]
    assert np.bincount(split.validation.labels).tolist() == [2, 2]
    # Two tracks of three frames hold the 4 test images of a class and one the 2 of validation: 3 over.
    assert split.facts["notes"][-1] == "6 images left out, so that no group is on two sides"
    assert len(split.train) == 36 - 8 - 4 - 6
    without = make_split(section(root, test_per_class=4))
    assert tracks_of(without, root, "train") & tracks_of(without, root, "test")


def test_group_over_two_classes(tmp_path):
    root = write_tracks(tmp_path, tracks=4)
    for frame in range(3):
        os.rename(root / f"train/bee/t10_{frame}.png", root / f"train/bee/t00_{frame + 3}.png")
    split = make_split(section(root, group_pattern=r"(t\d+)_", test_per_class=3))
    assert not tracks_of(split, root, "train") & tracks_of(split, root, "test")


def test_too_few_groups(tmp_path):
    root = write_tracks(tmp_path, tracks=2)
    with pytest.raises(BadInput, match="too few groups|leave no training image"):
        make_split(section(root, group_pattern=r"(t\d+)_", test_per_class=5))


def test_pattern_that_matches_nothing(folder):
    root = write_tracks(folder / "tracks")
    with pytest.raises(BadInput, match=r"dataset.group_pattern: matches no file name, e.g. t00_0.png"):
        make_split(section(root, group_pattern="(video[0-9]+)"))


# --- faults -------------------------------------------------------------------------------------


def faulty(root):
    """Five faults of five kinds among the images."""
    good = encoded(picture(1), "JPEG")
    write(root / "train/ant/zz_text.png", b"no image")
    write(root / "train/ant/zz_half.jpg", encoded(picture(1, size=(64, 64)), "JPEG")[:-100])
    write(root / "train/ant/zz_notes.txt", b"notes")
    write(root / "test/ant/zz_empty.png", b"")
    outside = write(root.parent / f"{root.name} secret.jpg", good)
    os.symlink(outside, root / "train/bee/zz_link.jpg")
    return root


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_all_faults_are_counted_before_the_stop(folder, loading):
    with pytest.raises(BadInput) as refused:
        make_split(section(faulty(folder), loading=loading))
    told = str(refused.value)
    assert "5 of 26 images are faulty" in told and "\n" not in told
    for line in ("train/ant/zz_text.png is not a JPEG", "train/ant/zz_half.jpg is truncated or broken",
                 "train/ant/zz_notes.txt is none of .jpg", "test/ant/zz_empty.png is empty",
                 "train/bee/zz_link.jpg is a link that leads out of the root", "dataset.on_error: skip"):
        assert line in told


@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_skipped_images_are_counted_and_named(folder, loading):
    whole = make_split(section(folder, loading=loading))
    split = make_split(section(faulty(folder), loading=loading, on_error="skip"))
    assert split.counts == whole.counts and len(split.test) == len(whole.test)
    assert split.facts["skipped"]["n"] == 5 and len(split.facts["skipped"]["first"]) == 5


def test_the_first_ten_are_named(folder):
    for number in range(30):
        write(folder / f"train/ant/bad{number:02d}.png", b"no image")
    with pytest.raises(BadInput, match="30 of 51 images are faulty.*bad09.png.*and 20 more;") as refused:
        make_split(section(folder))
    assert "bad10" not in str(refused.value)


def test_unreadable_file(folder):
    os.symlink("ring.png", folder / "train/ant/ring.png")  # a link to itself cannot be opened by anyone
    with pytest.raises(BadInput, match="1 of 22 images are faulty: train/ant/ring.png"):
        make_split(section(folder))


@pytest.mark.parametrize(("path", "message"), [
    ("train/stray.png", "train/stray.png is in no class's folder"),
    ("train/ant/two\nlines.png", "two.*lines.png has a name that is not printable text"),
])
def test_an_image_that_has_no_class_or_a_name_that_cannot_be_told(folder, path, message):
    write(folder / path, encoded(picture(1), "PNG"))
    with pytest.raises(BadInput, match=f"1 of 22 images are faulty: .*{message}") as refused:
        make_split(section(folder))
    assert "\n" not in str(refused.value)


def test_link_to_a_folder_outside(folder, tmp_path_factory):
    away = write_folder(tmp_path_factory.mktemp("away"), {"owl": {"x": 3}})
    os.symlink(away / "owl" / "x", folder / "train" / "dog")
    with pytest.raises(BadInput, match="train/dog is a link to a folder"):
        make_split(section(folder))


def test_link_inside_the_root_is_fine(folder):
    os.symlink(folder / "train/ant/000.png", folder / "train/ant/again.png")
    assert make_split(section(folder)).counts == [9, 5, 2]


def test_hidden_files_are_passed_over(folder):
    write(folder / "train/ant/.DS_Store", b"x")
    write(folder / "train/.ipynb_checkpoints/a.png", b"x")
    assert make_split(section(folder)).counts == [8, 5, 2]


@pytest.mark.parametrize(("make", "message"), [
    (lambda root: None, "dataset.root: has a folder train/"),
    (lambda root: (root / "train").mkdir(), "train: is empty"),
    (lambda root: write_folder(root, {"train": {"ant": 0, "bee": 0}}), "has no training image"),
    (lambda root: write_folder(root, {"train": {"ant": 2, "bee": 0}}),
     "1 of 2 classes without a training image: bee"),
    (lambda root: write_folder(root, {"train": {"ant": 2}, "test": {"ant": 1, "owl": 1}}),
     "1 classes of test that training lacks: owl"),
    (lambda root: write_folder(root, {"train": {"ant": 2}, "val": {"owl": 1}}),
     "1 classes of validation that training lacks: owl"),
    (lambda root: write_folder(root, {"train": {"ant": 2}, "val": {"ant": 1}, "validation": {"ant": 1}}),
     "has val/ and validation/"),
    (lambda root: write_folder(root, {"train": {"ant": 2, "bee": 0}, "test": {"bee": 1}}),
     "1 of 2 classes of test that training lacks: bee"),
])
def test_wrong_layout(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(BadInput, match=message):
        make_split(section(tmp_path))


def test_missing_root(tmp_path):
    with pytest.raises(BadInput, match="dataset.root: no such folder"):
        make_split(section(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="dataset.root: is a folder"):
        make_split(section(write(tmp_path / "file", b"")))


def test_a_class_whose_images_are_all_skipped(folder):
    for path in (folder / "train" / "cat").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(BadInput, match="classes of test that training lacks: cat"):
        make_split(section(folder, on_error="skip"))


# --- identity -----------------------------------------------------------------------------------


def test_identity_is_the_contents_not_the_places(tmp_path):
    roots = [write_folder(tmp_path / name, COUNTS) for name in ("a", "b")]
    sections = [section(root) for root in roots]
    assert identity(sections[0]) == identity(sections[1]) == make_split(sections[0]).facts["fingerprint"]
    write(roots[1] / "train/ant/000.png", encoded(picture(77, size=(30, 30))))
    changed = SOURCES["folder"].identity(sections[1])
    (roots[1] / "train/ant/000.png").rename(roots[1] / "train/ant/008.png")
    assert len({identity(sections[0]), changed, SOURCES["folder"].identity(sections[1])}) == 3


def test_digits_as_a_folder_are_the_embedded_digits(tmp_path):
    from PIL import Image

    from diffult_ray.data import digits

    images, labels, _ = digits.load()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "train" / str(label) / f"{number:04d}.png"
        write(path, encoded(Image.fromarray(image[0])))
    shared = {"imbalance_factor": 50, "max_per_class": 120, "validation_per_class": 8}
    ours = make_split(section(tmp_path, profile="exp", test_per_class=50, **shared))
    theirs = make_split(Dataset(name="digits", **shared))
    for part in ("train", "validation", "test", "balanced"):
        np.testing.assert_array_equal(getattr(ours, part).images, getattr(theirs, part).images)
        np.testing.assert_array_equal(getattr(ours, part).labels, getattr(theirs, part).labels)
    assert ours.channels == 1
