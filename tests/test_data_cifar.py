"""CIFAR's official files: read when their md5 is right, and never unpickled when it is not."""

import hashlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from torchvision import datasets

from diffult_ray.config import Dataset
from diffult_ray.data import make_split
from diffult_ray.data.sources import identity
from diffult_ray.errors import BadInput
from tests import data_files


def make_official(monkeypatch, known, md5s):
    """The md5s are those of the real files; the generated ones are read only under their own."""
    for field in ("train_list", "test_list"):
        monkeypatch.setattr(known, field, [[n, md5s[n]] for n, _ in getattr(known, field)])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": md5s[known.meta["filename"]]})


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    make_official(monkeypatch, datasets.CIFAR100, data_files.write_cifar100(tmp_path))
    return tmp_path


def section(root, name="cifar100", **values):
    return Dataset(name=name, root=str(root), **{"imbalance_factor": 6, "max_per_class": 6, **values})


def test_cifar100_is_torchvisions(cifar100):
    split = make_split(section(cifar100))
    theirs = datasets.CIFAR100(cifar100, train=True)
    np.testing.assert_array_equal(
        split.balanced.images, theirs.data.transpose(0, 3, 1, 2)[split.balanced.source]
    )
    np.testing.assert_array_equal(split.balanced.labels, np.array(theirs.targets)[split.balanced.source])
    assert sorted(split.balanced.source) == list(range(600))
    assert (len(split.test), len(split.validation)) == (600, 0)
    assert split.class_names[99] == "name 99"
    assert (split.counts[0], split.counts[-1]) == (6, 1)
    assert split.facts["root"] == str(cifar100)


def test_cifar10_joins_its_batches_in_order(tmp_path, monkeypatch):
    make_official(monkeypatch, datasets.CIFAR10, data_files.write_cifar10(tmp_path))
    split = make_split(section(tmp_path, "cifar10", profile="natural", max_per_class=None))
    first = [split.train.images[split.train.source == 20 * b][0].max() for b in range(5)]
    assert first == [0, 1, 2, 3, 4]
    assert split.test.images.max() == 5 and len(split.test) == 20


def test_validation_is_left_over_and_changes_no_other_index(cifar100):
    without = make_split(section(cifar100, max_per_class=4, imbalance_factor=4))
    split = make_split(section(cifar100, max_per_class=4, imbalance_factor=4, validation_per_class=2))
    np.testing.assert_array_equal(split.train.source, without.train.source)
    assert np.bincount(split.validation.labels).tolist() == [2] * 100
    assert not set(split.validation.source) & set(split.balanced.source)
    assert set(split.train.source) < set(split.balanced.source)
    assert len(split.balanced) == 400


def test_nothing_left_over_for_validation(cifar100):
    with pytest.raises(BadInput, match=r"0 images of name 0 \(got 2\); lower dataset.max_per_class by 2"):
        make_split(section(cifar100, validation_per_class=2))


def test_grey_and_resized(cifar100):
    split = make_split(section(cifar100, channels=1, image_size=16))
    assert split.test.images.shape == (600, 1, 16, 16)
    assert (split.channels, split.image_size) == (1, 16)


class Trap:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_wrong_md5_is_not_unpickled(cifar100, name):
    trace = cifar100 / "trace"
    data_files.write(cifar100 / "cifar-100-python" / name, pickle.dumps(Trap(trace)))
    with pytest.raises(BadInput, match=f"{name}: has the md5 of the official file.*is not opened"):
        make_split(section(cifar100))
    assert not trace.exists()
    pickle.loads((cifar100 / "cifar-100-python" / name).read_bytes()).close()
    assert trace.exists()  # the trap works


def test_truncated_file(cifar100):
    path = cifar100 / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="has the md5 of the official file"):
        make_split(section(cifar100))


def test_missing_file(cifar100):
    (cifar100 / "cifar-100-python" / "test").unlink()
    with pytest.raises(BadInput, match="test: cannot be read: No such file"):
        make_split(section(cifar100))


def test_missing_root(tmp_path):
    with pytest.raises(BadInput, match="dataset.root: no such folder"):
        make_split(section(tmp_path / "nowhere"))


def test_empty_root(tmp_path):
    with pytest.raises(BadInput, match="holds neither cifar-100-python/ nor cifar-100-python.tar.gz"):
        make_split(section(tmp_path))


def test_half_downloaded_archive(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"half")
    with pytest.raises(BadInput, match="half downloaded or changed: 4 bytes"):
        make_split(section(tmp_path))


def test_archive_not_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz"):
        pass
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5)
    with pytest.raises(BadInput, match="is whole but not unpacked.*tar -xzf"):
        make_split(section(tmp_path))


def test_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR100, "url", (tmp_path / "none.tar.gz").as_uri())
    with pytest.raises(BadInput, match="dataset.download: .* could not be fetched") as refused:
        make_split(section(tmp_path, download=True))
    assert "\n" not in str(refused.value)


def test_download_unpacks_a_whole_archive(tmp_path, monkeypatch):
    """torchvision fetches nothing where the archive is there with its md5."""
    make_official(monkeypatch, datasets.CIFAR100, data_files.write_cifar100(tmp_path))
    folder, archive = tmp_path / "cifar-100-python", tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(make_split(section(tmp_path, download=True)).balanced) == 600


def test_identity_needs_no_file():
    ten, hundred = (identity(section("/nowhere", n)) for n in ("cifar10", "cifar100"))
    assert ten != hundred and len(ten) == 32
