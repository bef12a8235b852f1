"""The long-tailed split as one object, on disk and in memory, whichever set it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffult_ray import files
from diffult_ray.config import Dataset
from diffult_ray.data import pixels
from diffult_ray.data.choice import Choice, choose_parts
from diffult_ray.data.decode import decode
from diffult_ray.data.encoded import iter_bytes, read_bytes
from diffult_ray.data.references import References, pack
from diffult_ray.data.source import Faults, Records, Source, check_classes
from diffult_ray.data.sources import open_source

PARTS = ("train", "validation", "test", "balanced")
PACKED = "images.arrow"  # encoded images that came as rows of parquet files
MOVED = ".root"  # a note beside the artifact, no part of it
FACTS = (
    "root", "fingerprint", "column", "skipped", "notes", "channels", "image_size", "mean", "std", "packed",
)
STATISTICS_SAMPLE = 5000  # training images, evenly spaced, whose pixels give mean and deviation


@dataclass(frozen=True)
class Part:
    """Images [n, C, H, W] uint8, labels [n] int64, and their indices [n] in the source's part.

    A streamed part has no images but references: `paths` [n] str relative to the split's root, and
    `rows` [n] int64, the row inside a parquet file, or -1 where the file itself is the image.
    """

    images: np.ndarray | None
    labels: np.ndarray
    source: np.ndarray
    paths: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """A long-tailed set.

    `train` is the long tail; `validation` (perhaps empty) chooses between the cells of a sweep;
    `test` measures; `balanced` is the full training set, which only measures: it holds `train` and
    what the profile left over, and no image of the other two. A set that is taken as it comes has
    nothing left over, and `balanced` is `train`.

    `facts` are what `split.json` tells besides: root, fingerprint, skipped, notes, column, mean and std
    a channel of the training images in [0, 1], and channels and image_size, which a streamed split cannot
    tell from its images.
    """

    name: str
    class_names: list[str]
    train: Part
    validation: Part
    test: Part
    balanced: Part
    streamed: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> list[int]:
        """Training images a class."""
        return np.bincount(self.train.labels, minlength=self.num_classes).tolist()

    @property
    def channels(self) -> int:
        return self.facts["channels"] if self.streamed else self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.facts["image_size"] if self.streamed else self.train.images.shape[-1]

    def references(self, part: str) -> References:
        """The references of a streamed part."""
        import pyarrow as pa

        chosen: Part = getattr(self, part)
        paths = pa.array(chosen.paths, pa.string())
        return References(self.facts["root"], paths, chosen.rows, self.channels, self.image_size)

    def encoded(self, part: str, index: np.ndarray) -> list[bytes]:
        """Encoded images of a streamed part at `index` [k], in its order.

        Raises:
            OSError: for a file that cannot be read.
            ValueError: for a row that has no image.
        """
        chosen: Part = getattr(self, part)
        if self.packed or (chosen.rows[index] < 0).all():
            return list(self.references(part).take(index).read())
        column = self.facts["column"]
        return read_bytes(self.facts["root"], chosen.paths[index], chosen.rows[index], column=column)

    @property
    def packed(self) -> bool:
        """Whether the rows of its parts are those of a packed file, no longer of parquet files."""
        return self.facts.get("packed", False)

    def pixels(self, part: str, index: np.ndarray) -> np.ndarray:
        """Pixels [k, C, H, W] uint8 of a part at `index` [k], in memory or streamed.

        Raises:
            OSError, ValueError: as `encoded`, and for an image that cannot be decoded.
        """
        if not self.streamed:
            return getattr(self, part).images[index]
        shape = {"channels": self.channels, "image_size": self.image_size}
        images = [decode(data, **shape) for data in self.encoded(part, index)]
        return np.stack(images) if images else np.empty((0, self.channels, *(self.image_size,) * 2), np.uint8)


# --- making -------------------------------------------------------------------------------------


def make_split(config: Any) -> Split:
    """The split of a `dataset` section: every image that it may take is read or checked before.

    Raises:
        BadInput: for a set that is not there or has faulty images, or too few for what is asked.
    """
    config = config if isinstance(config, Dataset) else Dataset.model_validate(vars(config))
    faults = Faults(config.on_error)
    source, streamed, facts = _read(open_source(config, faults), config, faults)
    where = f"dataset.root {source.root}" if source.root else "dataset"
    total = len(faults.found) + sum(len(records) for records in source.parts.values())
    faults.settle(where, total)
    check_classes(source, where)
    choice = choose_parts(source, config)
    parts = {name: _part(source.parts[part], index, streamed) for name, (part, index) in choice.parts.items()}
    if np.array_equal(parts["balanced"].source, parts["train"].source):
        parts["balanced"] = parts["train"]
    split = Split(
        name=source.name,
        class_names=source.class_names,
        streamed=streamed,
        facts={**facts, **_facts(source, faults, choice)},
        **parts,
    )
    return replace(split, facts={**split.facts, **_statistics(split)})


def _statistics(split: Split) -> dict[str, list[float]]:
    """Mean and standard deviation a channel; the same in memory and streamed."""
    n = len(split.train)
    sample = np.unique(np.linspace(0, n - 1, min(n, STATISTICS_SAMPLE)).astype(int))
    count, total, squares = 0, np.zeros(split.channels), np.zeros(split.channels)
    for index in np.array_split(sample, -(-len(sample) // 500)):
        pixels = split.pixels("train", index).astype(np.float64) / 255
        count += pixels[:, 0].size
        total += pixels.sum((0, 2, 3))
        squares += np.square(pixels).sum((0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(0, squares / count - mean**2))
    return {"mean": mean.round(4).tolist(), "std": std.clip(1e-3).round(4).tolist()}


def _read(source: Source, config: Dataset, faults: Faults) -> tuple[Source, bool, dict[str, int]]:
    """The source with pixels, or with checked references; whether it is streamed; and the images' shape."""
    size = pixels.check_size(source, config.image_size)
    shape = {"channels": pixels.channels_of(source, config.channels), "image_size": size}
    if not source.streamable:
        parts = {
            part: Records(records.labels, pixels=pixels.converted(records.pixels, **shape))
            for part, records in source.parts.items()
        }
        return source.with_parts(parts), False, shape
    if pixels.is_streamed(source, loading=config.loading, **shape):
        return pixels.checked(source, faults), True, shape
    return pixels.decoded(source, faults, **shape), False, shape


def _part(records: Records, index: np.ndarray, streamed: bool) -> Part:
    chosen = records.take(index)
    if streamed:
        return Part(None, chosen.labels, index, chosen.paths, chosen.rows)
    return Part(chosen.pixels, chosen.labels, index)


def _facts(source: Source, faults: Faults, choice: Choice) -> dict[str, Any]:
    return {
        "root": source.root,
        "fingerprint": source.fingerprint,
        "column": source.column,
        "skipped": faults.facts,
        "notes": choice.notes,
    }


# --- on disk ------------------------------------------------------------------------------------


def save_split(split: Split, folder: str | Path) -> None:
    """Write `split.json`, and the parts: one `<part>.safetensors` each, or `split.parquet` if streamed.

    A streamed split holds paths relative to its root, and never pixels. Images that are rows of parquet
    files are copied once, still encoded, into `images.arrow`, since parquet cannot be read at random.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = [name for name in PARTS if name != "balanced" or split.balanced is not split.train]
    if split.streamed:
        split = _packed(split, folder / PACKED)
        _write_references(split, stored, folder / "split.parquet")
    else:
        for name in stored:
            _write_arrays(getattr(split, name), folder / f"{name}.safetensors")
    files.write_json(folder / "split.json", {
        **split.facts,
        "name": split.name,
        "class_names": split.class_names,
        "class_counts": split.counts,
        "parts": {name: len(getattr(split, name)) for name in PARTS},
        "stored": stored,
        "streamed": split.streamed,
        "channels": split.channels,
        "image_size": split.image_size,
    })


def load_split(folder: str | Path, root: str | None = None) -> Split:
    """Read what `save_split` wrote; pixels are mapped, so that only those which are used are read.

    Args:
        root: where the data of a streamed split lie now, if not where they lay when it was made, or where
            `move` has said.
    """
    folder = Path(folder)
    facts = files.read_json(folder / "split.json")
    if facts["streamed"]:
        parts = _read_references(folder, facts["stored"])
    else:
        parts = {name: _read_arrays(folder / f"{name}.safetensors") for name in facts["stored"]}
    parts.setdefault("balanced", parts["train"])
    known = {key: facts[key] for key in FACTS if key in facts}
    return Split(
        name=facts["name"],
        class_names=facts["class_names"],
        streamed=facts["streamed"],
        facts={**known, "root": root or _moved_to(folder) or known.get("root")},
        **parts,
    )


def move(folder: str | Path, root: str) -> None:
    """Say where the data of a stored split lie now: its key is their content's, wherever they are."""
    if files.read_json(Path(folder) / "split.json")["root"] != root:
        files.write_bytes(Path(folder) / MOVED, root.encode())
    else:
        (Path(folder) / MOVED).unlink(missing_ok=True)


def _moved_to(folder: Path) -> str | None:
    try:
        return (folder / MOVED).read_text()
    except OSError:
        return None


def _write_arrays(part: Part, path: Path) -> None:
    """Straight to the disk, since a copy of two gigabytes may not fit beside them."""
    from safetensors.numpy import save_file

    arrays = {"images": part.images, "labels": part.labels, "source": part.source}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    temporary.chmod(0o644)  # safetensors writes for its owner alone; a cluster's users share artifacts
    temporary.replace(path)


def _read_arrays(path: Path) -> Part:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return Part(*(tensors.get_tensor(name).numpy() for name in ("images", "labels", "source")))


def _write_references(split: Split, names: list[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [(name, getattr(split, name)) for name in names]
    columns = {"part": np.concatenate([np.full(len(part), name, object) for name, part in parts])}
    for column, field_name in (("path", "paths"), ("row", "rows"), ("label", "labels"), ("source", "source")):
        columns[column] = np.concatenate([getattr(part, field_name) for _, part in parts])
    table = pa.table({
        **columns, **{name: pa.array(columns[name], pa.string()) for name in ("part", "path")},
    })
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _packed(split: Split, path: Path) -> Split:
    """The split with the encoded images of parquet files in a packed file, each once."""
    parts = {name: getattr(split, name) for name in PARTS}
    if split.packed or all((part.rows < 0).all() for part in parts.values()):
        return split
    keys = sorted({key for part in parts.values() for key in _keys(part)})
    order: list[int] = []

    def contents() -> Iterator[list[bytes]]:
        paths, rows = np.array([k[0] for k in keys], object), np.array([k[1] for k in keys])
        for index, batch in iter_bytes(split.facts["root"], paths, rows, column=split.facts["column"]):
            for content in batch:
                if isinstance(content, Exception):
                    raise content
            order.extend(index.tolist())
            yield batch

    pack(path, contents())
    row = {keys[i]: position for position, i in enumerate(order)}

    def moved(part: Part) -> Part:
        rows = [row[key] for key in _keys(part)]
        return replace(part, paths=np.full(len(part), PACKED, object), rows=np.array(rows, np.int64))

    moves = {name: moved(part) for name, part in parts.items()}
    if split.balanced is split.train:
        moves["balanced"] = moves["train"]
    return replace(split, facts={**split.facts, "packed": True}, **moves)


def _keys(part: Part) -> Iterator[tuple[str, int]]:
    return zip(part.paths, part.rows.tolist(), strict=True)


def _read_references(folder: Path, names: list[str]) -> dict[str, Part]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "split.parquet").to_pandas()
    table.loc[table["row"] >= 0, "path"] = str(folder.absolute() / PACKED)
    return {name: _references(table[table["part"] == name]) for name in names}


def _references(table: Any) -> Part:
    paths = table["path"].to_numpy(dtype=object)
    labels, source, rows = (table[c].to_numpy(dtype=np.int64) for c in ("label", "source", "row"))
    return Part(None, labels, source, paths, rows)
