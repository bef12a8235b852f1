"""A build's room: what an earlier one has left is kept, and its late writers find no way in."""

from __future__ import annotations

import pytest

from diffult_ray import fence, files


def test_the_next_build_has_what_the_last_one_left(tmp_path):
    first = fence.enter(tmp_path / "work")
    files.write_bytes(first / "checkpoint", b"half")
    assert fence.latest(tmp_path / "work") == first
    second = fence.enter(tmp_path / "work")
    assert (second / "checkpoint").read_bytes() == b"half" and not first.exists()
    assert list((tmp_path / "work").iterdir()) == [second]


def test_a_late_writer_writes_beside_the_room_and_is_not_gone_on_from(tmp_path):
    first = fence.enter(tmp_path / "work")
    files.write_bytes(first / "part", b"good")
    with open(first / "part", "rb"), pytest.raises(FileNotFoundError):
        second = fence.enter(tmp_path / "work")
        open(first / "new", "wb")  # noqa: SIM115
    files.write_bytes(first / "part", b"late")
    assert fence.latest(tmp_path / "work") == second
    third = fence.enter(tmp_path / "work")
    assert (third / "part").read_bytes() == b"good"
    assert list((tmp_path / "work").iterdir()) == [third]


def test_of_artifacts_only_the_complete_ones_are_taken_over(tmp_path):
    room = fence.enter(tmp_path / "work")
    files.write_bytes(room / fence.OUTS / "whole" / "summary.json", b"{}")
    files.write_bytes(room / fence.OUTS / "half" / "weights", b"1")
    assert [out.name for out in (fence.enter(tmp_path / "work") / fence.OUTS).iterdir()] == ["whole"]


def test_a_room_in_which_nothing_was_written_goes(tmp_path):
    room = fence.enter(tmp_path / "work")
    (room / fence.OUTS / "key").mkdir(parents=True)
    fence.leave(room)
    assert not room.exists()
    used = fence.enter(tmp_path / "work")
    files.write_bytes(used / "checkpoint", b"half")
    fence.leave(used)
    assert (used / "checkpoint").exists()
