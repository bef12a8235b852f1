"""What a data set looks like to the rest of the project, whichever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from diffult_ray.errors import BadInput

NAMED = 10  # faults, classes and the like that one message names


@dataclass(frozen=True)
class Records:
    """Images of one part of a source, with labels [n] int64.

    Either `pixels` [n, C, H, W] uint8, or references: `paths` [n] str relative to the source's root,
    and `rows` [n] int64, the row inside a parquet file, or -1 where the file itself is the image.
    """

    labels: np.ndarray
    pixels: np.ndarray | None = None
    paths: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Records:
        """The records at `index`, in its order."""
        kept = {
            name: None if value is None else value[index]
            for name, value in (("pixels", self.pixels), ("paths", self.paths), ("rows", self.rows))
        }
        return Records(labels=self.labels[index], **kept)


@dataclass(frozen=True)
class Source:
    """A data set as it is stored: class names, and the records of the parts that it has.

    Args:
        parts: "train", and "validation" and "test" where the source has them.
        root: absolute folder, file or URI that the references are relative to.
        fingerprint: of the content, as `fingerprint` gives it.
        column: of the images in parquet files.
        cut_first: the long tail is chosen from the whole training set and validation from what it
            leaves over (the field's CIFAR-LT); else what is held out is taken first.
        test_per_class: hold-out of a source without a test part, where the set has a fixed one.
    """

    name: str
    class_names: list[str]
    parts: Mapping[str, Records]
    fingerprint: str
    root: str | None = None
    column: str = "image"
    cut_first: bool = False
    test_per_class: int | None = None

    def with_parts(self, parts: Mapping[str, Records]) -> Source:
        return replace(self, parts=dict(parts))

    @property
    def streamable(self) -> bool:
        """Whether the records are references."""
        return self.parts["train"].paths is not None


@dataclass
class Faults:
    """Faulty images: all are counted before the stop, the first ten are named."""

    on_error: str = "stop"
    found: list[str] = field(default_factory=list)

    def add(self, name: str, rule: str) -> None:
        """Count one faulty image."""
        self.found.append(f"{name} {rule}")

    @property
    def facts(self) -> dict[str, object]:
        """How many there are, and the first ten."""
        return {"n": len(self.found), "first": self.found[:NAMED]}

    def settle(self, where: str, total: int) -> None:
        """Stop if there are any and they are not to be skipped.

        Raises:
            BadInput: names how many of `total` are faulty, and the first ten.
        """
        if not self.found or self.on_error == "skip":
            return
        raise BadInput(
            where=where,
            rule=f"{len(self.found)} of {total} images are faulty: {some(self.found)}",
            advice="repair or remove them, or set dataset.on_error: skip",
        )


def some(names: Iterable[object], separator: str = "; ") -> str:
    """The first ten names, and how many more there are."""
    names = [str(n) for n in names]
    more = f"{separator}and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more


def fingerprint(entries: Iterable[tuple[str, object]]) -> str:
    """32 hexadecimal digits of (relative path, size or checksum) pairs, whatever their order.

    >>> fingerprint([("b", 2), ("a", 1)]) == fingerprint([("a", 1), ("b", 2)])
    True
    """
    text = "\n".join(f"{name}\t{value}" for name, value in sorted((n, str(v)) for n, v in entries))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def check_classes(source: Source, where: str) -> None:
    """Every class has a training image, and no other part has a class that training lacks.

    Raises:
        BadInput: names the classes and the part.
    """
    classes = len(source.class_names)
    there = np.bincount(source.parts["train"].labels, minlength=classes)[:classes]
    if not there.any():
        raise BadInput(where=where, rule="has no training image", advice="check dataset.root")
    for part in ("test", "validation"):
        if part in source.parts:
            held = np.bincount(source.parts[part].labels, minlength=classes)[:classes]
            lacking = np.flatnonzero((held > 0) & (there == 0))
            _refuse(source, lacking, where, f"of {part} that training lacks")
    _refuse(source, np.flatnonzero(there == 0), where, "without a training image")


def _refuse(source: Source, classes: np.ndarray, where: str, what: str) -> None:
    if len(classes):
        names = some((source.class_names[c] for c in classes), ", ")
        raise BadInput(
            where=where,
            rule=f"{len(classes)} of {len(source.class_names)} classes {what}: {names}",
            advice="add training images of them, or take the classes out",
        )
