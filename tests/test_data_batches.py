"""Batches against a loop over images; draws that do not depend on how the batch is shared."""

import numpy as np
import pytest
import torch

from diffult_ray.data import batches
from diffult_ray.data.batches import (
    augment,
    balanced_indices,
    batch_indices,
    class_members,
    draw,
    generator,
    normalise,
)


def images(n=12, channels=3, height=9, width=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, channels, height, width), generator=rng, dtype=torch.uint8)


def literal(x, drawn, padding, hole):
    """One image after another, pixel by pixel."""
    n, _, height, width = x.shape
    out = np.zeros_like(x.numpy())
    for i in range(n):
        down, right = (drawn.shift[:, i].tolist() if drawn.shift is not None else (padding, padding))
        for r in range(height):
            for c in range(width):
                column = width - 1 - c if drawn.mirrored is not None and drawn.mirrored[i] else c
                at = r + down - padding, column + right - padding
                if 0 <= at[0] < height and 0 <= at[1] < width:
                    out[i, :, r, c] = x[i, :, at[0], at[1]]
                if drawn.hole is not None:
                    first = (drawn.hole[:, i] - hole // 2).tolist()
                    if first[0] <= r < first[0] + hole and first[1] <= c < first[1] + hole:
                        out[i, :, r, c] = 0
    return torch.from_numpy(out)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("hole", [0, 1, 4, 30])
def test_augment_is_the_loop(padding, flip, hole):
    x = images()
    before = x.clone()
    drawn = draw(len(x), generator(5), padding=padding, flip=flip, cutout=hole, image_size=7)
    found = augment(x, drawn, padding=padding, cutout=hole)
    assert torch.equal(found, literal(x, drawn, padding, hole)) and torch.equal(x, before)


def test_both_paths_agree(monkeypatch):
    """What numpy does on a processor is what torch does on an accelerator."""
    x = images(64)
    drawn = draw(64, generator(1), padding=3, flip=True, cutout=3, image_size=7)
    on_processor = augment(x, drawn, padding=3, cutout=3)
    monkeypatch.setattr(batches, "_is_numpy", lambda images: False)
    assert torch.equal(augment(x, drawn, padding=3, cutout=3), on_processor)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
def test_crop_and_flip_keep_the_kind(kind):
    x = images(16).to(kind)
    for options in ({"padding": 2}, {"flip": True}, {"cutout": 3, "image_size": 7}):
        sizes = {name: options[name] for name in ("padding", "cutout") if name in options}
        found = augment(x, draw(len(x), generator(1), **options), **sizes)
        assert found.dtype == kind and found.shape == x.shape and not torch.equal(found, x)


def test_crop_reaches_every_offset():
    x = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(4000, 1, 5, 5)
    found = augment(x, draw(len(x), generator(0), padding=2), padding=2)
    corners, counts = torch.unique(found[:, 0, 2, 2], return_counts=True)
    assert len(corners) == 25 and counts.min() > 100  # 160 expected, sd 12


def test_flip_is_a_fair_coin():
    x = images(1).expand(4000, 3, 9, 7)
    mirrored = (augment(x, draw(len(x), generator(0), flip=True)) == x.flip(3)).all((1, 2, 3))
    assert abs(mirrored.float().mean() - 0.5) < 0.04  # five deviations


def test_cutout_needs_the_image_size():
    with pytest.raises(ValueError, match="a cutout is drawn within an image_size"):
        draw(3, generator(0), cutout=2)


def test_shares_of_a_batch_are_the_batch():
    x, index = images(40), torch.arange(30, 10, -1)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    drawn = draw(20, generator(2), padding=2, flip=True, cutout=2, image_size=7)

    def batch(index, drawn):
        return normalise(augment(x[index], drawn, padding=2, cutout=2), mean, std)

    whole = batch(index, drawn)
    for world in (1, 3):
        shares = [batches.share(20, rank=r, world=world) for r in range(world)]
        parts = [batch(index[mine], drawn.only(mine)) for mine in shares]
        assert torch.equal(torch.cat(parts), whole)


def test_normalise():
    x = images(5)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    expected = (x.double() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    torch.testing.assert_close(normalise(x, mean, std).double(), expected, atol=1e-5, rtol=0)
    assert normalise(x, mean, std).dtype == torch.float32


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_epochs_are_whole(batch_size):
    steps = [batch_indices(seed=1, step=s, batch_size=batch_size, n=10) for s in range(10)]
    assert all(len(s) == batch_size for s in steps)
    drawn = torch.cat(steps)
    for epoch in drawn[: len(drawn) // 10 * 10].view(-1, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])


# --- batches in which each class comes equally often --------------------------------------------------

LABELS = torch.tensor([0] * 13 + [2] * 5 + [3] * 1 + [5] * 3)  # classes 1 and 4 have no image


def balanced(step, seed=0, batch_size=6):
    members = class_members(LABELS)
    return balanced_indices(seed=seed, step=step, batch_size=batch_size, members=members)


def test_every_class_comes_equally_often_whatever_its_size():
    for batch_size in (4, 6, 64):
        every = torch.cat([balanced(step, batch_size=batch_size) for step in range(20)])
        counts = LABELS[every].bincount(minlength=6)
        assert counts[[1, 4]].tolist() == [0, 0]
        assert int(counts[[0, 2, 3, 5]].max() - counts[[0, 2, 3, 5]].min()) <= 1
        each = LABELS[balanced(7, batch_size=batch_size)].bincount(minlength=6)[[0, 2, 3, 5]]
        assert int(each.max() - each.min()) <= 2


def test_the_images_of_a_class_come_equally_often():
    every = torch.cat([balanced(step) for step in range(130)])  # 195 rounds: 15 epochs of 13, 39 of 5
    counts = every.bincount(minlength=len(LABELS))
    assert counts[:13].tolist() == [15] * 13 and counts[13:18].tolist() == [39] * 5
    assert counts[18:].tolist() == [195, 65, 65, 65]


def test_balanced_batches_are_of_seed_and_step_alone():
    later = balanced(11)
    [balanced(step) for step in range(5)]
    assert torch.equal(later, balanced(11))
    assert not torch.equal(later, balanced(11, seed=1)) and not torch.equal(later, balanced(12))
