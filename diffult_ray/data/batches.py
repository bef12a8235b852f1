"""Batches by step: the global batch is a function of seed and step, and each rank takes its share.

So a run's batches do not depend on how many workers share them, and a run that goes on from a
checkpoint sees the batches it would have seen. The images stay uint8 on their device, and whole
batches are augmented at once, each image by its own draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from diffult_ray.seeds import stream


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the stream `names` of `seed`."""
    return torch.Generator(device=device).manual_seed(stream(seed, *names))


def batch_indices(*, seed: int, step: int, batch_size: int, n: int) -> torch.Tensor:
    """Indices [batch_size] of global step `step` (from 0): shuffled epochs one after another."""
    first = step * batch_size
    parts, wanted = [], batch_size
    while wanted:
        epoch, offset = divmod(first, n)
        part = _epoch(seed, epoch, n)[offset : offset + wanted]
        parts.append(part)
        wanted -= len(part)
        first += len(part)
    return torch.cat(parts)


def class_members(labels: torch.Tensor) -> list[torch.Tensor]:
    """The indices of each class's images, for the classes that have any."""
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


def balanced_indices(
    *, seed: int, step: int, batch_size: int, members: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Indices [batch_size] of global step `step` (from 0) in which each class comes equally often.

    The classes come in shuffled rounds, each once a round, so that in any run of images two classes
    differ by two at most; the images of a class come in shuffled epochs of its own.

    Args:
        members: of `class_members`.
    """
    classes = len(members)
    chosen = batch_indices(seed=stream(seed, "classes"), step=step, batch_size=batch_size, n=classes)
    rows = []
    for place, label in enumerate(chosen.tolist(), start=step * batch_size):
        mine = members[label]
        epoch, offset = divmod(place // classes, len(mine))  # a class's n-th image is in the n-th round
        rows.append(mine[_class_epoch(seed, label, epoch, len(mine))[offset]])
    return torch.stack(rows)


@lru_cache(maxsize=20_000)
def _class_epoch(seed: int, label: int, epoch: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "class", label, epoch))


def share(n: int, *, rank: int, world: int) -> slice:
    """Which of the n rows of a global batch are rank's: contiguous, sizes differ by one at most."""
    return slice(n * rank // world, n * (rank + 1) // world)


# --- augmentation, a batch at a time ------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What is random about a batch of n images: drawn whole from one stream, a rank takes its rows.

    `shift` [2, n] is the offset of each crop in the padded image, from the top and from the left;
    `mirrored` [n] bool; `hole` [2, n] is the centre of the part that is cut out. None: not drawn.
    """

    shift: torch.Tensor | None = None
    mirrored: torch.Tensor | None = None
    hole: torch.Tensor | None = None

    def only(self, rows: slice) -> Draw:
        """The draws of some rows of the batch."""
        shift, hole = (None if x is None else x[:, rows] for x in (self.shift, self.hole))
        return Draw(shift, None if self.mirrored is None else self.mirrored[rows], hole)


def draw(
    n: int,
    rng: torch.Generator,
    *,
    padding: int = 0,
    flip: bool = False,
    cutout: int = 0,
    image_size: int | None = None,
) -> Draw:
    """Draw the crop, flip and cutout of n images, in this order.

    Args:
        padding: zeros around the image that a crop may reach into.
        cutout: side of the square that is cut out; needs `image_size`.

    Raises:
        ValueError: for a cutout without the image size.
    """
    if cutout and image_size is None:
        raise ValueError("a cutout is drawn within an image_size")
    device = rng.device
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=rng, device=device) if padding else None
    mirrored = torch.rand(n, generator=rng, device=device) < 0.5 if flip else None
    hole = torch.randint(0, image_size, (2, n), generator=rng, device=device) if cutout else None
    return Draw(None if shift is None else shift[..., 0], mirrored, hole)


def augment(images: torch.Tensor, drawn: Draw, *, padding: int = 0, cutout: int = 0) -> torch.Tensor:
    """Images [n, C, H, W] cropped, mirrored and cut out as drawn; none of the input is written to."""
    out = images if drawn.shift is None else _crop(images, padding, drawn.shift)
    out = out if drawn.mirrored is None else _mirror(out, drawn.mirrored)
    return out if drawn.hole is None else _cut_out(out, drawn.hole, cutout)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 images -> (x / 255 - mean) / std as float32, with mean and std [C] on the images' device."""
    scale = (1 / (255 * std)).view(1, -1, 1, 1)
    shift = (mean / std).view(1, -1, 1, 1)
    return images.float().mul_(scale).sub_(shift)


def _crop(images: torch.Tensor, padding: int, shift: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    padded = pad(images, (padding,) * 4)
    if _is_numpy(images):
        windows = _windows(padded, height, width)
        rows = torch.arange(len(images))
        return torch.from_numpy(windows[rows.numpy(), :, shift[0].numpy(), shift[1].numpy()])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, shift[0], shift[1]]


def _is_numpy(images: torch.Tensor) -> bool:
    """On a processor numpy copies whole rows of a window, 4 times faster than torch gathers pixels."""
    return images.device.type == "cpu" and not images.requires_grad and images.dtype != torch.bfloat16


def _windows(padded: torch.Tensor, height: int, width: int):
    """All crops [n, C, offsets down, offsets right, H, W] as a view."""
    from numpy.lib.stride_tricks import sliding_window_view

    return sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))


def _mirror(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    if not _is_numpy(images):
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)
    out, which = images.clone(), mirrored.numpy()
    out.numpy()[which] = images.numpy()[which][..., ::-1]
    return out


def _cut_out(images: torch.Tensor, centre: torch.Tensor, size: int) -> torch.Tensor:
    """Zeros from `centre - size // 2` on, `size` pixels down and right."""
    first = (centre - size // 2)[..., None]  # [2, n, 1]
    at = torch.arange(max(images.shape[-2:]), device=images.device)
    inside = (at >= first) & (at < first + size)
    down, right = inside[0, :, : images.shape[-2]], inside[1, :, : images.shape[-1]]
    return images.masked_fill((down[:, :, None] & right[:, None, :])[:, None], 0)
