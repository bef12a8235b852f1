"""Streaming JPEG files through Ray Data against a bare Pillow loop on as many processes.

    python tests/benchmarks/streaming.py [--images 100000] [--repeats 3] [--readers 2]

The files, 64x64 in colour, are made first. Variants alternate in one run: the bare loop (read, decode,
to an array) and the streamed feed of a training loop (references shuffled, read, decoded, to tensors in
the order of the steps), plain, and with RandomResizedCrop, flip and jitter beside the same loop with
torchvision's transforms. One JSON line tells images a second, their ratios, and the memory of all of
Ray's processes beyond what they hold before the first image (proportional set size, largest sample).
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from measure import summary, tell
from PIL import Image

SIZE, BATCH, FOLDERS = 64, 128, 100


def write_images(root: Path, n: int) -> list[str]:
    """n JPEG files of smooth random pictures, in a hundred folders as classes are; their relative paths."""
    rng, paths = np.random.default_rng(0), []
    for c in range(FOLDERS):
        (root / f"{c:03d}").mkdir()
    for i in range(n):
        pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        path = f"{i % FOLDERS:03d}/{i:06d}.jpg"
        (root / path).write_bytes(buffer.getvalue())
        paths.append(path)
    return paths


def bare(paths: list[str]) -> int:
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert("RGB"))
    return len(paths)


def transformed(paths: list[str]) -> int:
    from torchvision import transforms

    change = transforms.Compose([
        transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4),
    ])
    for path in paths:
        with Image.open(path) as image:
            np.asarray(change(image.convert("RGB")))
    return len(paths)


def pillow_rate(pool, loop: Callable[[list[str]], int], paths: list[str]) -> float:
    parts = [paths[i : i + 512] for i in range(0, len(paths), 512)]
    start = time.perf_counter()
    n = sum(pool.imap_unordered(loop, parts))
    return n / (time.perf_counter() - start)


def streamed_rate(root: Path, paths: list[str], readers: int, *, augmented: bool, epoch: int) -> float:
    from diffult_ray.data.augment import Augmentation
    from diffult_ray.data.references import References
    from diffult_ray.stages.feed import Epochs, Plan, make

    references = References(str(root), pa.array(paths), np.full(len(paths), -1), 3, SIZE)
    steps = len(paths) // BATCH
    rule = Augmentation(image_size=SIZE, jitter=0.4) if augmented else None
    plan = Plan(Epochs(epoch, BATCH, len(paths)), slice(0, BATCH), 0, steps, augmentation=rule)
    start = time.perf_counter()
    feed = make(references, plan, device=torch.device("cpu"), readers=readers)
    n = sum(len(feed(step)) for step in range(steps))
    return n / (time.perf_counter() - start)


class Memory(threading.Thread):
    """Proportional set size of Ray's processes and this one: at the start, and the largest since."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.ended = mark.encode(), threading.Event()
        self.first = self.most = self._sum()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.most = max(self.most, self._sum())

    def _sum(self) -> int:
        return sum(map(self._bytes, Path("/proc").glob("[0-9]*")))

    def _bytes(self, process: Path) -> int:
        try:
            if self.mark not in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                return 0
            return 1024 * int(re.search(r"^Pss: +(\d+)", (process / "smaps_rollup").read_text(), re.M)[1])
        except (OSError, TypeError):
            return 0


def measure(folder: Path, images: int, repeats: int, readers: int) -> dict[str, object]:
    root = folder / "images"
    root.mkdir()
    paths = write_images(root, images)
    whole = [str(root / p) for p in paths]
    rates: dict[str, list[float]] = {}
    memory = Memory(f"RAY_TMPDIR={os.environ.pop('RAY_TMPDIR')}")
    memory.start()
    with multiprocessing.get_context("spawn").Pool(readers) as pool:
        for repeat in range(repeats + 1):
            found = {
                "pillow": pillow_rate(pool, bare, whole),
                "streamed": streamed_rate(root, paths, readers, augmented=False, epoch=repeat),
                "pillow, augmented": pillow_rate(pool, transformed, whole[: images // 4]),
                "streamed, augmented": streamed_rate(
                    root, paths[: images // 4], readers, augmented=True, epoch=repeat
                ),
            }
            for name, rate in found.items():
                rates.setdefault(name, []).extend([rate] if repeat else [])  # the first one warms up
    memory.ended.set()
    pairs = (("streamed", "pillow"), ("streamed, augmented", "pillow, augmented"))
    return {
        "images": images, "n": repeats, "readers": readers,
        "images_per_second": {name: summary(r) for name, r in rates.items()},
        "ratio": {a: summary([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in pairs},
        "extra_memory_gib": round((memory.most - memory.first) / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--readers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ds-"))
    os.environ["RAY_TMPDIR"] = str(folder / "ray")
    os.environ.pop("RAY_ADDRESS", None)
    from diffult_ray.cluster import connect, disconnect

    try:
        connect("local")
        found = measure(folder, options.images, options.repeats, options.readers)
        tell(f"streaming JPEG files of {SIZE}x{SIZE}", packages=("torch", "ray", "pillow"), **found)
    finally:
        disconnect()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
