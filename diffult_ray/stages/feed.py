"""How a training loop gets its images: from memory, or through Ray Data from their files.

A feed gives the rows of a step that are this rank's, unaugmented or with the crop that needs the
image's own resolution. Which rows a step has is a function of seed and step alone, so that both ways
and any number of workers see the same images in the same order, each exactly once an epoch.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from diffult_ray.data.augment import EVALUATION_MARGIN, Augmentation, augmented
from diffult_ray.data.decode import decoded
from diffult_ray.data.references import References, packed
from diffult_ray.stages import SHARED, Site

__all__ = ["EVALUATION_MARGIN", "Augmentation", "References", "packed"]

if TYPE_CHECKING:
    import pyarrow as pa
    import ray
    import torch
    from PIL.Image import Image

    from diffult_ray.data import Split

BLOCK_BYTES = 32 * 2**20  # of decoded images that one task returns; at least one step
BLOCK_ROWS = 2048
BLOCKS_A_DATASET = 1000  # so that the references of a long run are not all handed over at once
IN_FLIGHT_BYTES = 256 * 2**20  # of decoded images between readers and the training, a worker

Indices = Callable[[int], "torch.Tensor"]  # step -> indices [batch] into the training set


@dataclass(frozen=True)
class Epochs:
    """Shuffled epochs, one after another: step -> indices [batch_size] of n images."""

    seed: int
    batch_size: int
    n: int

    def __call__(self, step: int) -> torch.Tensor:
        from diffult_ray.data.batches import batch_indices

        return batch_indices(seed=self.seed, step=step, batch_size=self.batch_size, n=self.n)


@dataclass(frozen=True)
class InOrder:
    """All n images once, in their order; the last step may be shorter."""

    batch_size: int
    n: int

    def __call__(self, step: int) -> torch.Tensor:
        import torch

        first = step * self.batch_size
        return torch.arange(first, min(self.n, first + self.batch_size))

    @property
    def steps(self) -> int:
        return -(-self.n // self.batch_size)


# --- what there is to feed ----------------------------------------------------------------------


def pictures(split: Split, part: str) -> torch.Tensor | References:
    """The images [n, C, H, W] uint8 of a split's part, or the references to them."""
    if split.streamed:
        return split.references(part)
    import torch

    return torch.from_numpy(getattr(split, part).images)


def take(images: torch.Tensor | References, index: torch.Tensor) -> torch.Tensor | References:
    """Images or references at `index`."""
    return images.take(index.numpy()) if isinstance(images, References) else images[index]


def join(first: torch.Tensor | References, second: torch.Tensor | References) -> torch.Tensor | References:
    """Images and images, or references and references."""
    if isinstance(first, References):
        return first.join(second)
    import torch

    return torch.cat([first, second])


# --- feeds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which rows of which steps a feed gives, and how they are decoded.

    Args:
        indices: of the global batch of a step.
        mine: this rank's rows of it.
        first, total: the steps to come are first .. total - 1.
        partners: step -> further rows [k] of the global batch that this rank needs after its own.
        augmentation: at the image's own resolution; None for the plain decoding.
        seed: of the augmentation's draws.
        margin: of the short side over the centre crop of a plain decoding.
    """

    indices: Indices
    mine: slice
    first: int
    total: int
    partners: Callable[[int], torch.Tensor] | None = None
    augmentation: Augmentation | None = None
    seed: int = 0
    margin: float = 1.0

    def rows(self, step: int) -> torch.Tensor:
        """Positions [k] in the global batch of the images that the feed gives."""
        import torch

        own = torch.arange(len(self.indices(step)))[self.mine]
        return own if self.partners is None else torch.cat([own, self.partners(step).cpu()])

    def chosen(self, step: int) -> torch.Tensor:
        """Their indices [k] into the training set."""
        return self.indices(step)[self.rows(step)]


def make(
    images: torch.Tensor | References, plan: Plan, *, device: torch.device, readers: int, site: Site = SHARED
) -> Feed:
    """A feed of images in memory, or of streamed ones through `readers` decoding tasks at a time."""
    if isinstance(images, References):
        return StreamedFeed(images, plan, device=device, readers=readers, site=site)
    return MemoryFeed(images, plan, device=device)


class Feed:
    """`feed(step)` -> uint8 [k, C, H, W] on the device, for step = first, first + 1, ... in turn."""

    def __call__(self, step: int) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Stop what reads ahead."""


class MemoryFeed(Feed):
    def __init__(self, images: torch.Tensor, plan: Plan, *, device: torch.device) -> None:
        self.images, self.plan, self.device = images.to(device), plan, device

    def __call__(self, step: int) -> torch.Tensor:
        index = self.plan.chosen(step).to(self.device, non_blocking=True)
        # index_select copies whole images, where images[index] gathers pixel by pixel on a processor.
        return self.images.index_select(0, index)


class StreamedFeed(Feed):
    """Blocks of steps decoded by Ray tasks, a bounded number of bytes ahead of the training."""

    def __init__(
        self, references: References, plan: Plan, *, device: torch.device, readers: int, site: Site
    ) -> None:
        self.plan, self.device = plan, device
        self.shape = (references.image_size, references.image_size, references.channels)
        self.every = _steps_a_block(references, plan)
        self._expected = plan.first
        self._batches = self._run(references, readers, site)

    def __call__(self, step: int) -> torch.Tensor:
        if step != self._expected:
            raise ValueError(f"a streamed feed goes on with step {self._expected}, not {step}")
        self._expected += 1
        return next(self._batches).to(self.device, non_blocking=True)

    def close(self) -> None:
        self._batches.close()

    def _run(self, references: References, readers: int, site: Site) -> Iterator[torch.Tensor]:
        import ray
        import torch

        plan = self.plan
        task = Decode(ray.put(references), site, plan.augmentation, plan.seed, plan.margin)
        starts = range(plan.first, plan.total, self.every)
        for first in range(0, len(starts), BLOCKS_A_DATASET):
            wanted = [self._wanted(start) for start in starts[first : first + BLOCKS_A_DATASET]]
            for block in _in_order(wanted, task, readers):
                decoded = np.frombuffer(block["images"][0].as_buffer(), np.uint8).reshape(-1, *self.shape)
                steps = block["step"][0].values.to_numpy()
                for rows in np.split(decoded, np.flatnonzero(np.diff(steps)) + 1):
                    # A copy, since the object store's memory is read-only and goes with the block.
                    yield torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)

    def _wanted(self, start: int) -> pa.Table:
        """One row: of each image of the block its step, its position in the batch, and its index."""
        import pyarrow as pa

        plan = self.plan
        steps = range(start, min(plan.total, start + self.every))
        rows = [plan.rows(step).numpy() for step in steps]
        return pa.table({
            "start": [start],
            "step": [np.repeat(steps, [len(positions) for positions in rows])],
            "position": [np.concatenate(rows)],
            "index": [np.concatenate([plan.chosen(step).numpy() for step in steps])],
        })


def _steps_a_block(references: References, plan: Plan) -> int:
    rows = max(1, len(plan.rows(plan.first)))
    fits = min(BLOCK_ROWS, BLOCK_BYTES // int(np.prod(references.shape)))
    return max(1, fits // rows)


def _in_order(wanted: Sequence[pa.Table], task: Decode, readers: int) -> Iterator[pa.Table]:
    """The wanted blocks in their order, in which Ray Data need not deliver them after a failure."""
    import ray.data
    from ray.data import TaskPoolStrategy

    tasks = TaskPoolStrategy(min(len(wanted), readers + 1))
    with _quiet_context():
        # The tasks hold no CPU, so that they find room beside trainers that hold all; `readers` bounds
        # them, and one more waits, so that none is idle while the next is on its way.
        # from_arrow would run tasks that want a whole CPU each, to count the rows.
        dataset = ray.data.from_blocks(wanted).map_batches(
            task, batch_size=None, batch_format="pyarrow", num_cpus=0, compute=tasks
        )
        blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    kept: dict[int, pa.Table] = {}
    for start in (table["start"][0].as_py() for table in wanted):
        while start not in kept:
            block = next(blocks)
            for row in range(block.num_rows):
                kept[block["start"][row].as_py()] = block.slice(row, 1)
        yield kept.pop(start)


class _quiet_context:
    """Ray Data's settings while a data set is made, which keeps a copy of them."""

    def __enter__(self) -> None:
        from ray.data import DataContext

        self.before = DataContext.get_current()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its copy reads settings that it has deprecated
            ours = self.before.copy()
        ours.enable_progress_bars = False
        ours.print_on_execution_start = False
        ours.execution_options.preserve_order = True
        limits = ours.execution_options.resource_limits
        ours.execution_options.resource_limits = limits.copy(object_store_memory=IN_FLIGHT_BYTES)
        DataContext._set_current(ours)

    def __exit__(self, *_: object) -> None:
        from ray.data import DataContext

        DataContext._set_current(self.before)


# --- in the readers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """Rows (start, step, position, index) -> the same with the images, as one value of bytes a row."""

    references: ray.ObjectRef
    site: Site
    augmentation: Augmentation | None
    seed: int
    margin: float

    def __call__(self, rows: pa.Table) -> pa.Table:
        import pyarrow as pa

        references = _fetched(self.references, self.site)
        with _no_collection():
            made = [self._block(references, row) for row in rows.to_batches()[0].to_struct_array()]
        column = pa.chunked_array([_as_binary(images) for images in made])
        return rows.select(["start", "step"]).append_column("images", column)

    def _block(self, references: References, row: pa.StructScalar) -> np.ndarray:
        """Images [n, H, W, C] uint8."""
        step, position, index = (row[name].values.to_numpy() for name in ("step", "position", "index"))
        size, channels = references.image_size, references.channels
        images = np.empty((len(index), size, size, channels), np.uint8)
        for i, data in enumerate(references.take(index).read()):
            image = np.asarray(self._decoded(data, references, int(step[i]), int(position[i])))
            images[i] = image if channels == 3 else image[..., None]
        return images

    def _decoded(self, data: bytes, references: References, step: int, position: int) -> Image:
        size = references.image_size
        if self.augmentation is not None:
            return augmented(data, self.augmentation, seed=self.seed, epoch=step, image_id=position)
        short = round(size * self.margin)
        return decoded(data, channels=references.channels, image_size=size, short_side=short)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would go through all that Ray has loaded every few images."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _as_binary(images: np.ndarray) -> pa.Array:
    """One value, the bytes of all images, without a copy of them."""
    import pyarrow as pa

    offsets = pa.py_buffer(np.array([0, images.nbytes]))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(images)])


@lru_cache(maxsize=2)
def _fetched(reference: ray.ObjectRef, site: Site) -> References:
    """Once a process: what a task is given anew each time costs more than a block."""
    import ray

    references = ray.get(reference)
    return references if site.is_shared else references.moved(lambda path: str(site.fetch(path)))
