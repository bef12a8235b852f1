"""Which images train, which choose between cells, which test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from diffult_ray.data.longtail import choose, profile_counts, shuffled
from diffult_ray.data.source import Source, some
from diffult_ray.errors import BadInput

MOST_HELD_OUT = 50  # test images a class, where a source has no test part and no number is given


@dataclass
class Choice:
    """Part -> (the source's part, indices into it), and what was decided on the way."""

    parts: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_parts(source: Source, config: Any) -> Choice:
    """Train, validation, test and balanced of a source whose classes are all there.

    Raises:
        BadInput: if a class has too few images for what is asked.
    """
    choice = Choice()
    for part in ("validation", "test"):
        if part in source.parts:
            choice.parts[part] = (part, np.arange(len(source.parts[part])))
    if source.cut_first:
        _cut_first(source, config, choice)
    else:
        _hold_out_first(source, config, choice)
    return choice


# --- CIFAR: the tail first ----------------------------------------------------------------------


def _cut_first(source: Source, config: Any, choice: Choice) -> None:
    """The field's indices; validation from the other end of each class's order, so that it changes none."""
    labels, classes = source.parts["train"].labels, len(source.class_names)
    orders = shuffled(labels, classes, config.seed)
    room = np.array([len(order) for order in orders])
    counts = _counts(source, config, room, "")
    held = config.validation_per_class
    _check_left(source, room - counts, held)
    pairs = list(zip(orders, counts, strict=True))
    choice.parts["train"] = ("train", np.concatenate([order[:n] for order, n in pairs]))
    choice.parts["validation"] = ("train", np.concatenate([order[len(order) - held :] for order in orders]))
    choice.parts["balanced"] = ("train", np.concatenate([order[: len(order) - held] for order in orders]))


def _check_left(source: Source, left: np.ndarray, held: int) -> None:
    short = np.flatnonzero(left < held)
    if len(short):
        least = int(left.min())
        raise BadInput(
            where="dataset.validation_per_class",
            rule=f"is taken from what the long tail leaves over, {least} images of "
                 f"{source.class_names[int(left.argmin())]}",
            value=held,
            advice=f"lower dataset.max_per_class by {held - least}, or set it to 0 with select: test",
        )


# --- the others: what is held out first ---------------------------------------------------------


def _hold_out_first(source: Source, config: Any, choice: Choice) -> None:
    """Test first, so that it stays the same images whatever the profile; then validation, then train."""
    labels, classes = source.parts["train"].labels, len(source.class_names)
    wanted = {
        "test": 0 if "test" in source.parts else _test_per_class(source, config),
        "validation": 0 if "validation" in source.parts else config.validation_per_class,
    }
    held, dropped = _held_out(source, config, wanted)
    left = labels.copy()
    left[np.concatenate([*held.values(), dropped])] = -1
    room = np.bincount(left[left >= 0], minlength=classes)
    _check_room(source, room, wanted)
    _cut(source, config, choice, left, room)
    for part, index in held.items():
        choice.parts.setdefault(part, ("train", index))
        if len(index) and source.test_per_class is None:
            choice.notes.append(f"{part}: {wanted[part]} images a class held out of train")
    if len(dropped):
        choice.notes.append(f"{len(dropped)} images left out, so that no group is on two sides")


def _cut(source: Source, config: Any, choice: Choice, left: np.ndarray, room: np.ndarray) -> None:
    """The tail of what is left, and the same shuffle without one, which so contains it."""
    counts = _counts(source, config, room, " beside test and validation")
    choice.parts["train"] = ("train", choose(left, counts, config.seed))
    full = profile_counts("natural", room=room, max_per_class=config.max_per_class, imbalance_factor=1)
    choice.parts["balanced"] = ("train", choose(left, full, config.seed))


def _test_per_class(source: Source, config: Any) -> int:
    """As given; else the set's own; else a fifth of the smallest class, at most 50."""
    given = config.test_per_class or source.test_per_class
    if given:
        return given
    smallest = np.bincount(source.parts["train"].labels, minlength=len(source.class_names)).min()
    return int(max(1, min(MOST_HELD_OUT, smallest // 5)))


def _held_out(
    source: Source, config: Any, wanted: dict[str, int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Part -> indices, balanced over the classes; and the images that belong to no side."""
    labels, classes = source.parts["train"].labels, len(source.class_names)
    if config.group_pattern is not None:
        return _held_out_by_group(source, config, wanted)
    total = sum(wanted.values())
    _check_room(source, np.bincount(labels, minlength=classes) - total, wanted)
    held = choose(labels, [total] * classes, config.seed).reshape(classes, -1)
    test, validation = held[:, : wanted["test"]], held[:, wanted["test"] :]
    return {"test": test.ravel(), "validation": validation.ravel()}, np.empty(0, np.int64)


def _check_room(source: Source, room: np.ndarray, wanted: dict[str, int]) -> None:
    short = np.flatnonzero(room < 1)
    if len(short):
        asked = " and ".join(f"{n} for {part}" for part, n in wanted.items() if n)
        raise BadInput(
            where="dataset.test_per_class" if wanted["test"] else "dataset.validation_per_class",
            rule=f"{asked} a class leave no training image of "
                 f"{some((source.class_names[c] for c in short), ', ')}",
            advice="lower it, or give the data set a part of its own",
        )


# --- groups -------------------------------------------------------------------------------------


def group_names(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each file by the first capture group of a pattern on its name; without a match, its own.

    Raises:
        BadInput: if no name matches.
    """
    names = [PurePosixPath(path).name for path in paths]
    found = [re.search(pattern, name) for name in names]
    if not any(found):
        raise BadInput(
            where="dataset.group_pattern", rule=f"matches no file name, e.g. {names[0]}", value=pattern,
            advice="it is searched in the name without its folder",
        )
    groups = [match[1] if match else None for match in found]
    return [f"file {path}" if g is None else f"group {g}" for g, path in zip(groups, paths, strict=True)]


def _held_out_by_group(
    source: Source, config: Any, wanted: dict[str, int]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Whole groups are held out, class by class in shuffled order, until each class has its number.

    What the last group has too many of is dropped: it may neither train nor unbalance the hold-out.
    """
    train = source.parts["train"]
    _, groups = np.unique(group_names(train.paths, config.group_pattern), return_inverse=True)
    side = np.zeros(groups.max() + 1, np.int8)  # of a group: 0 trains, 1 test, 2 validation
    orders = shuffled(train.labels, len(source.class_names), config.seed)
    held = {}
    for code, part in ((1, "test"), (2, "validation")):
        for order in orders if wanted[part] else ():
            _assign(side, groups[order], code, wanted[part])
    for code, part in ((1, "test"), (2, "validation")):
        mine = [order[side[groups[order]] == code][: wanted[part]] for order in orders]
        _check_held(source, [len(m) for m in mine], wanted[part], part)
        held[part] = np.concatenate(mine)
    dropped = np.setdiff1d(np.flatnonzero(side[groups] > 0), np.concatenate(list(held.values())))
    return held, dropped


def _assign(side: np.ndarray, groups: np.ndarray, code: int, wanted: int) -> None:
    """Give a class's groups to a side, in order, until the class has `wanted` images there."""
    for group in dict.fromkeys(groups.tolist()):
        if (side[groups] == code).sum() >= wanted:
            return
        if side[group] == 0:
            side[group] = code


def _check_held(source: Source, found: list[int], wanted: int, part: str) -> None:
    short = [source.class_names[c] for c, n in enumerate(found) if n < wanted]
    if short:
        raise BadInput(
            where="dataset.group_pattern",
            rule=f"too few groups to hold {wanted} images for {part} out of {some(short, ', ')}",
            advice="lower dataset.test_per_class or dataset.validation_per_class",
        )


# --- counts -------------------------------------------------------------------------------------


def _counts(source: Source, config: Any, room: np.ndarray, beside: str) -> np.ndarray:
    """Training images a class, each at least one and at most what there is.

    Raises:
        BadInput: names the class that is too small, or says that the tail runs out.
    """
    counts = profile_counts(
        config.profile,
        room=room,
        max_per_class=config.max_per_class,
        imbalance_factor=config.imbalance_factor,
    )
    for c, (count, there) in enumerate(zip(counts, room, strict=True)):
        if count > there:
            raise BadInput(
                where="dataset.max_per_class",
                rule=f"class {source.class_names[c]} of {source.name} has {there} images{beside}",
                value=f"{config.max_per_class}, which takes {count} of it",
                advice="lower it, or dataset.validation_per_class",
            )
    if min(counts) == 0:
        raise BadInput(
            where="dataset.imbalance_factor",
            rule="leaves a class without a training image",
            value=config.imbalance_factor,
            advice=f"at most dataset.max_per_class ({config.max_per_class})",
        )
    return np.array(counts)
