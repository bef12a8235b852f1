"""Peak memory of the processes that work for a stage."""

from __future__ import annotations

import mmap
import subprocess
import sys

from diffult_ray import files, footprint
from diffult_ray.stages import SHARED

OF_TWO_JOBS = """
import numpy as np
from diffult_ray import footprint
first = np.ones(200 * 2**20, np.uint8)
print(footprint.peaks()["memory_mib"])
del first
footprint.begin()
print(footprint.peaks()["memory_mib"])
second = np.ones(100 * 2**20, np.uint8)
print(footprint.peaks()["memory_mib"])
"""


def test_a_process_that_is_used_again_counts_from_its_new_work_on():
    done = subprocess.run([sys.executable, "-c", OF_TWO_JOBS], capture_output=True, text=True, check=True)
    first, between, second = map(int, done.stdout.split())
    assert first >= 200 and between <= first - 150 and between + 80 <= second <= first - 50


def test_the_largest_of_several_processes_counts(tmp_path):
    for name, size in (("a", 100), ("b", 300), ("c", 200)):
        files.write_json(tmp_path / footprint.FOLDER / f"{name}.json", {"memory_mib": size})
    other = tmp_path / "other"
    files.write_json(other / footprint.FOLDER / "d.json", {"memory_mib": 50, "gpu_memory_mib": 70})
    found = footprint.collected({tmp_path: SHARED, other: SHARED})
    assert found == {"memory_mib": 300, "gpu_memory_mib": 70}


def test_of_a_stage_without_workers_it_is_the_driver(tmp_path):
    assert footprint.collected({tmp_path / "none": SHARED})["memory_mib"] > 10


def test_a_process_tells_again_only_what_has_grown(tmp_path):
    footprint.begin()  # the tests before may have needed more than is added here
    note = footprint.Footprint(SHARED, tmp_path)
    note.note()
    (path,) = (tmp_path / footprint.FOLDER).glob("*.json")
    told = files.read_json(path)
    path.unlink()
    note.note()
    assert not path.exists()
    # Pages of its own: what tests before have freed may still be resident, and would be used again.
    with mmap.mmap(-1, int(0.1 * told["memory_mib"] + 50) * 2**20) as more:
        more.write(bytes(range(1, 256)) * (len(more) // 255))
        note.note()
    assert files.read_json(path)["memory_mib"] > told["memory_mib"]
