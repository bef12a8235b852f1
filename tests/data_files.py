"""Small data sets in the official formats, written by the tests that read them."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, *, size: tuple[int, int] = (12, 10), channels: int = 3) -> Image.Image:
    """A random image, smooth enough to be told from another after JPEG."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 4, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_folder(root: Path, counts: Mapping[str, Mapping[str, int]], **options) -> Path:
    """`<part>/<class>/<number>.png`, as many as told: {"train": {"cat": 3}}."""
    seed = 0
    for part, classes in counts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                seed += 1
                write(root / part / name / f"{number:03d}.png", encoded(picture(seed, **options)))
    return root


def write_cifar100(root: Path, per_class: int = 6, classes: int = 100) -> dict[str, str]:
    """Files in CIFAR-100's official format; returns the md5 of each."""
    labels = [c for c in range(classes) for _ in range(per_class)]
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    batch = {"data": pixels, "fine_labels": labels, "filenames": ["x.png"] * len(labels)}
    names = {"fine_label_names": [f"name {c}" for c in range(classes)]}
    return _write_pickles(root / "cifar-100-python", {"train": batch, "test": batch, "meta": names})


def write_cifar10(root: Path, per_batch: int = 20) -> dict[str, str]:
    """Files in CIFAR-10's official format; returns the md5 of each."""
    contents = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((per_batch, 3072), number, dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [i % 10 for i in range(per_batch)]}
    contents["batches.meta"] = {"label_names": [f"name {c}" for c in range(10)]}
    return _write_pickles(root / "cifar-10-batches-py", contents)


def _write_pickles(folder: Path, contents: Mapping[str, object]) -> dict[str, str]:
    written = {name: write(folder / name, pickle.dumps(value)) for name, value in contents.items()}
    return {name: hashlib.md5(path.read_bytes()).hexdigest() for name, path in written.items()}


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int | None],
    *,
    struct: bool = True,
    names: list[str] | None = None,
    image: str = "image",
    label: str = "label",
    rows: int = 4,
) -> Path:
    """Hugging Face's layout: an image struct (or plain bytes), labels, and class names in the metadata."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [None if i is None else {"bytes": i, "path": None} for i in images] if struct else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({image: pa.array(values, kind), label: pa.array(labels, pa.int64())})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path
