"""Files are damaged between two runs: what is damaged is set aside and built again, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffult_ray import files
from tests.faults.door import Door, Tally


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated file": ("images", "pool/*.parquet", truncate),
    "flipped byte": ("extractor", "features.safetensors", flip),
    "half a manifest": ("quality", "manifest.json", truncate),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_artifact(kind: str, reference: Door, halfway: Callable[[], Door], tally: Tally):
    stage, pattern, damage = DAMAGE[kind]
    door = halfway()
    damage(sorted((door.storage / "artifacts" / stage).glob(f"*/{pattern}"))[0])
    with tally.fault():
        said = door.finish()
        assert said.count("is damaged") == 1
        tally.cost(door, reference)
        door.check(reference, hit=[stage])


def test_a_driver_dies_between_an_artifact_and_its_manifest(
    reference: Door, halfway: Callable[[], Door], tally: Tally
):
    door = halfway()
    (folder,) = (door.storage / "artifacts" / "extractor").iterdir()
    (folder / "manifest.json").rename(folder / ".manifest.json.0123abcd.tmp")
    with tally.fault():
        door.finish()
        tally.cost(door, reference)
        door.check(reference, hit=["extractor"])


def test_a_half_written_record(reference: Door, new_faulty: Callable[[], Door], tally: Tally):
    door = new_faulty()
    door.finish()
    (door.folder / "finished.json").unlink()
    truncate(sorted((door.folder / "trials").iterdir())[0])
    files.write_bytes(door.folder / "trials" / ".half.json.tmp", b"{")
    with tally.fault():
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
