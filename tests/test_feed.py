"""Images on their way to the training: the same in memory and through Ray Data, each once an epoch."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from diffult_ray.config import Dataset
from diffult_ray.data import Split, load_split, make_split, save_split
from diffult_ray.data.augment import Augmentation
from diffult_ray.data.batches import share
from diffult_ray.stages import feed
from tests.data_files import write_folder
from tests.test_data_parquet import write_hugging_face

CPU = torch.device("cpu")
COUNTS = {"train": {"ant": 20, "bee": 12, "cat": 5}, "test": {"ant": 3, "bee": 3, "cat": 3}}
N, BATCH = 37, 10  # three ranks of 3, 3 and 4 rows, and epochs that end inside a batch


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images", COUNTS, size=(24, 20))


@pytest.fixture(scope="module")
def splits(root) -> dict[str, Split]:
    def split(how: str) -> Split:
        return make_split(Dataset(name="folder", root=str(root), image_size=8, loading=how))

    return {how: split(how) for how in ("memory", "stream")}


def steps_of(images, *, rank: int = 0, world: int = 1, first: int = 0, total: int = 8, readers=2, rule=None):
    indices = feed.Epochs(5, BATCH, N)
    plan = feed.Plan(indices, share(BATCH, rank=rank, world=world), first, total, augmentation=rule, seed=5)
    made = feed.make(images, plan, device=CPU, readers=readers)
    found = [made(step).clone() for step in range(first, total)]
    made.close()
    return found


def test_ranks_of_uneven_shares_see_every_image_once_an_epoch(splits):
    labelled = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1)
    ranks = [steps_of(labelled, rank=rank, world=3, total=37) for rank in range(3)]
    assert sorted({len(step) for rank in ranks for step in rank}) == [3, 4]
    seen = [int(i) for step in range(37) for rank in ranks for i in rank[step].flatten()]
    for epoch in range(10):
        assert sorted(seen[epoch * N : (epoch + 1) * N]) == list(range(N))
    assert seen[:N] != seen[N : 2 * N]


@pytest.mark.parametrize("rank", range(3))
def test_streamed_images_are_those_in_memory_in_their_order(cluster, splits, monkeypatch, rank):
    monkeypatch.setattr(feed, "BLOCK_ROWS", 7)  # blocks of two steps
    monkeypatch.setattr(feed, "BLOCKS_A_DATASET", 2)
    memory, stream = (steps_of(feed.pictures(s, "train"), rank=rank, world=3) for s in splits.values())
    for ours, theirs in zip(stream, memory, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_streamed_feed_goes_on_from_a_step(cluster, splits):
    images = feed.pictures(splits["stream"], "train")
    whole, rest = steps_of(images), steps_of(images, first=5)
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_a_crop_at_full_resolution_depends_on_neither_ranks_nor_readers(cluster, splits):
    images = feed.pictures(splits["stream"], "train")
    rule = Augmentation(image_size=8, jitter=0.3)
    alone = steps_of(images, rule=rule, readers=1)
    ranks = [steps_of(images, rank=rank, world=3, rule=rule, readers=3) for rank in range(3)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), whole)
    assert not torch.equal(alone[0], steps_of(images)[0])


def test_partners_come_after_a_ranks_own_rows(cluster, splits):
    def partners(step: int) -> torch.Tensor:
        return torch.tensor([9, step, 0])

    indices = feed.Epochs(5, BATCH, N)
    plan = feed.Plan(indices, share(BATCH, rank=1, world=3), 0, 4, partners=partners)
    memory, stream = (
        feed.make(feed.pictures(s, "train"), plan, device=CPU, readers=1) for s in splits.values()
    )
    every = feed.pictures(splits["memory"], "train")
    for step in range(4):
        expected = every[indices(step)[[3, 4, 5, 9, step, 0]]]
        assert torch.equal(memory(step), expected) and torch.equal(stream(step), expected)


def test_readers_need_no_processor_beside_trainers_that_hold_all(cluster, splits):
    import ray

    @ray.remote(num_cpus=cluster.cpus)
    class Trainer:
        def first(self, images):
            return steps_of(images, total=2)[0]

    images = feed.pictures(splits["stream"], "train")
    trainer = Trainer.remote()
    found = ray.get(trainer.first.remote(images), timeout=60)
    ray.kill(trainer)
    assert torch.equal(found, steps_of(feed.pictures(splits["memory"], "train"), total=1)[0])


def test_a_killed_reader_changes_nothing(cluster, splits, monkeypatch, tmp_path):
    monkeypatch.setattr(feed, "BLOCK_ROWS", BATCH)
    images, marker = feed.pictures(splits["stream"], "train"), tmp_path / "killed"
    expected = steps_of(images, total=12)

    class KilledOnce(feed.Decode):
        def __call__(self, rows):
            if rows["start"][0].as_py() == 4 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows)

    monkeypatch.setattr(feed, "Decode", KilledOnce)
    found = steps_of(images, total=12)
    assert marker.exists()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_image_that_is_gone_stops_the_training_with_its_name(cluster, root):
    import shutil

    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    split = make_split(Dataset(name="folder", root=str(copy), image_size=8, loading="stream"))
    (copy / "train/bee/003.png").unlink()
    with pytest.raises(Exception, match="train/bee/003.png"):
        steps_of(feed.pictures(split, "train"))


def test_real_and_generated_images_are_mixed_alike(cluster, splits, tmp_path):
    from diffult_ray.data.references import pack
    from diffult_ray.stages.pool import encode

    generated = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    pack(tmp_path / "pool.arrow", [[e["bytes"] for e in encode(part)] for part in generated.numpy()[None]])
    kept = torch.tensor([4, 1, 5])
    memory = feed.join(feed.pictures(splits["memory"], "train"), generated[kept])
    packed = feed.packed(tmp_path / "pool.arrow", 6, channels=3, image_size=8)
    stream = feed.join(feed.pictures(splits["stream"], "train"), feed.take(packed, kept))
    assert len(memory) == len(stream) == N + 3
    every = feed.InOrder(16, N + 3)
    plan = feed.Plan(every, slice(None), 0, every.steps)
    ours, theirs = (feed.make(x, plan, device=CPU, readers=1) for x in (stream, memory))
    for step in range(every.steps):
        assert torch.equal(ours(step), theirs(step))


def test_parquet_is_streamed_from_a_packed_copy(cluster, tmp_path):
    root = write_hugging_face(tmp_path / "data")
    made = {
        how: make_split(Dataset(name="parquet", root=str(root), image_size=8, loading=how))
        for how in ("memory", "stream")
    }
    save_split(made["stream"], tmp_path / "split")
    stream = load_split(tmp_path / "split")
    assert stream.packed and stream.facts == {**made["stream"].facts, "packed": True}
    for part in ("train", "test", "balanced"):
        every = np.arange(len(getattr(stream, part)))
        np.testing.assert_array_equal(stream.pixels(part, every), made["memory"].pixels(part, every))
    n = len(stream.train)
    plan = feed.Plan(feed.Epochs(0, 4, n), slice(0, 4), 0, 5)
    ours, theirs = (feed.make(feed.pictures(s, "train"), plan, device=CPU, readers=1)
                    for s in (stream, made["memory"]))
    assert all(torch.equal(ours(step), theirs(step)) for step in range(5))


def test_epochs_are_shuffled_anew_and_whole():
    seen = torch.cat([feed.Epochs(0, BATCH, N)(step) for step in range(37)]).view(10, N)
    assert all(Counter(epoch.tolist()) == Counter(range(N)) for epoch in seen)
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 10
