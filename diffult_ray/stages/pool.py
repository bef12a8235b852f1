"""The generated pool: a parquet data set of PNG images that pandas, Ray Data and Hugging Face read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import torch

# What Hugging Face datasets writes for its Image feature: encoded bytes and an optional path.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROW_SCHEMA = pa.schema([("id", pa.int64()), ("label", pa.int64()), ("seed", pa.int64())])
IMAGE_SCHEMA = ROW_SCHEMA.append(pa.field("image", IMAGE))
SCORE_FIELDS = [
    ("distance", pa.float64()),  # in units of d_f; not rounded, so that it agrees with the band
    ("band", pa.string()),
    ("nearest", pa.int64()),  # of the real training images
    ("nearest_distance", pa.float64()),  # in feature space, not in units of d_f
    ("predicted", pa.int64()),  # the extractor's class
    ("closest", pa.int64()),  # of the real training images of all classes
    ("closest_ratio", pa.float64()),  # its distance, in units of its own to its nearest other one
]
SCORED_SCHEMA = pa.schema([*IMAGE_SCHEMA, *(pa.field(name, kind) for name, kind in SCORE_FIELDS)])
ROWS_PER_FILE = 20_000


def hugging_face_metadata(schema: pa.Schema) -> pa.Schema:
    """The schema with the note by which Hugging Face datasets decodes the image column."""
    kinds = {pa.int64(): "int64", pa.float64(): "float64", pa.string(): "string"}
    features = {
        f.name: {"_type": "Image"}
        if f.name == "image"
        else {"dtype": kinds[f.type], "_type": "Value"}
        for f in schema
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def encode(images: np.ndarray) -> list[dict]:
    """Images [n, C, H, W] uint8 (C is 1 or 3) as PNG structs."""
    from PIL import Image

    encoded = []
    for image in images:
        buffer = io.BytesIO()
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    return encoded


def decode(structs: Iterable[dict]) -> np.ndarray:
    """PNG structs of one size as [n, C, H, W] uint8."""
    from PIL import Image

    images = [np.asarray(Image.open(io.BytesIO(s["bytes"]))) for s in structs]
    stacked = np.stack(images) if images else np.empty((0, 1, 1), np.uint8)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


def write_pool(table: pa.Table, folder: Path) -> None:
    """A parquet data set of files of bounded size, replacing what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, max(1, table.num_rows), ROWS_PER_FILE)):
        part = table.slice(start, ROWS_PER_FILE)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", row_group_size=2000)


@dataclass(frozen=True)
class Pool:
    """A scored pool in the order of its ids."""

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    @cached_property
    def images(self) -> torch.Tensor:
        import torch

        return torch.from_numpy(decode(self.table["image"].to_pylist()))

    @property
    def labels(self) -> torch.Tensor:
        return self._tensor("label")

    @property
    def distance(self) -> torch.Tensor:
        return self._tensor("distance")

    @property
    def agrees(self) -> torch.Tensor:
        """[n] bool, whether the extractor predicts the label."""
        return self._tensor("predicted") == self.labels

    @cached_property
    def band(self) -> torch.Tensor:
        import torch

        from diffult_ray.method.bands import BANDS

        codes = {name: code for code, name in enumerate(BANDS)}
        return torch.tensor([codes[b] for b in self.table["band"].to_pylist()], dtype=torch.int8)

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(self.column(name)))


def read_pool(folder: str | Path) -> Pool:
    """The pool of an `images` or `scores` artifact, sorted by (label, id)."""
    table = pq.read_table(Path(folder) / "pool")
    return Pool(table.sort_by([("label", "ascending"), ("id", "ascending")]).combine_chunks())


def requests(counts: Iterable[int], seed: int) -> pa.Table:
    """One row an image to make: its id within the class, its label and its seed.

    Args:
        counts: images to make a class.
    """
    from diffult_ray.seeds import stream

    rows = [(i, label) for label, n in enumerate(counts) for i in range(n)]
    seeds = [stream(seed, "image", label, i) for i, label in rows]
    columns = [[i for i, _ in rows], [label for _, label in rows], seeds]
    return pa.table(columns, schema=ROW_SCHEMA)
