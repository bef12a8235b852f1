"""What a process keeps between tasks: the last two, and the process is set up again where they take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from diffult_ray.stages import held


@pytest.fixture
def asked() -> Iterator[Callable[[str], list[str]]]:
    """Asks for each name of a text in turn; tells what was made (upper case) and resumed (lower case)."""
    held.drop()
    yield lambda names: [told for name in names for told in ask(name)]
    held.drop()


def ask(name: str) -> list[str]:
    told: list[str] = []

    def make() -> str:
        told.append(name.upper())
        return name

    assert held.get(name, make, lambda: told.append(name)) == name
    return told


@pytest.mark.parametrize(("names", "told"), [
    ("aaa", "A"), ("abab", "ABab"), ("aabb", "AB"), ("abca", "ABCA"), ("abac", "ABaC"), ("abaca", "ABaCa"),
    ("abacb", "ABaCB"),
])
def test_the_two_that_were_used_last_are_kept(asked, names, told):
    assert "".join(asked(names)) == told


def test_other_work_drops_all(asked):
    assert asked("ab") == ["A", "B"]
    held.drop()
    assert asked("ab") == ["A", "B"]
