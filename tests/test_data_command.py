"""python -m diffult_ray.data: what it prints, what it draws, how it refuses."""

import pytest
from PIL import Image
from torchvision import datasets

from diffult_ray.data.__main__ import main
from tests.data_files import encoded, picture, write, write_cifar100, write_folder

COUNTS = {"train": {"ant": 8, "bee": 5, "cat": 2}, "test": {"ant": 2, "bee": 2, "cat": 2}}


def sweep(tmp_path, **dataset):
    text = f"name: animals\nexperiment:\n  select: test\n  dataset: {dataset}\n"
    text += "search: {dataset.seed: {grid: [0]}}\n"
    return str(write(tmp_path / "animals.yaml", text.encode()))


def folder_sweep(tmp_path, **values):
    root = write_folder(tmp_path / "data", COUNTS)
    return root, sweep(tmp_path, name="folder", root=str(root), image_size=8, **values)


def test_folder(tmp_path, capsys, monkeypatch):
    root, file = folder_sweep(tmp_path, on_error="skip")
    write(root / "train/ant/bad.png", encoded(picture(1))[:40])
    write(root / "train/ant/wide.png", encoded(picture(1, size=(30, 20))))
    monkeypatch.setenv("DIFFULT_STORAGE", str(tmp_path / "storage"))
    assert main([file]) == 0
    told = capsys.readouterr().out
    for line in (
        "folder, as it comes: 3 classes, held in memory",
        f"where      {root}",
        "skipped    1 faulty images: train/ant/bad.png",
        "images     8x8, colour; stored as 12x10, 30x20",
        "parts      train 16, validation 0, test 6, balanced 16",
        "counts     9 .. 2 a class, imbalance 4.5",
        "shots      many 0 classes, medium 0 classes, few 3 classes",
    ):
        assert line in told
    assert told.count("#") == 50 + 28 + 11
    figure = tmp_path / "storage" / "data" / "animals.png"
    assert f"figure: {figure}" in told and Image.open(figure).width > 500


def test_overrides_and_out(tmp_path, capsys):
    _, file = folder_sweep(tmp_path)
    out = tmp_path / "here.png"
    assert main([file, "dataset.profile=step", "dataset.max_per_class=2", "dataset.imbalance_factor=2",
                 "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "step profile, imbalance factor 2, at most 2 a class" in told and "train 4," in told
    assert out.exists()


def test_without_a_sweep_it_is_digits(tmp_path, capsys):
    assert main(["dataset.imbalance_factor=20", "--storage", str(tmp_path)]) == 0
    assert "digits, exp profile, imbalance factor 20" in capsys.readouterr().out
    assert (tmp_path / "data" / "digits.png").exists()


def test_checksums_and_many_classes(tmp_path, capsys, monkeypatch):
    md5s = write_cifar100(tmp_path)
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5s["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5s["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5s["meta"]})
    file = sweep(tmp_path, name="cifar100", root=str(tmp_path), max_per_class=6, imbalance_factor=6)
    assert main([file, "--out", str(tmp_path / "f.png")]) == 0
    told = capsys.readouterr().out
    assert "checksums  hold" in told and "100 classes" in told
    assert sum("name " in line for line in told.splitlines()) == 24  # bars, each of a run of classes
    write(tmp_path / "cifar-100-python" / "meta", b"other")
    assert main([file]) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere.yaml"], "no such file"),
    (["digits", "dataset.name=folder"], "is needed for folder"),
    (["digits", "dataset.max_per_class=5000"], "class 0 of digits has"),
])
def test_bad_input_is_one_line_and_exit_2(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--storage", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and message in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_figure_that_cannot_be_written(tmp_path, capsys):
    write(tmp_path / "file", b"")
    assert main(["digits", "--out", str(tmp_path / "file" / "x.png")]) == 2
    assert "--out: is a picture that can be written" in capsys.readouterr().err
