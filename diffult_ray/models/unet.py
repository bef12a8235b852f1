"""diffusers' U-Net with class labels; the class after the last is the null class of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import UNet2DModel


# Image size -> settings of `generator`: 32 is the public CBDM code's, 64 the same with a level more;
# 8 and 28 are ours, small enough for a processor.
PRESETS: dict[int, dict[str, Any]] = {
    8: {"channels": (32, 64), "blocks": 1, "attention": (4,), "dropout": 0.0},
    28: {"channels": (64, 128, 128), "blocks": 2, "attention": (14,), "dropout": 0.1},
    32: {"channels": (128, 256, 256, 256), "blocks": 2, "attention": (16,), "dropout": 0.1},
    64: {"channels": (128, 256, 256, 256, 512), "blocks": 2, "attention": (16,), "dropout": 0.1},
}


def unet_preset(image_size: int) -> dict[str, Any]:
    """`channels`, `blocks`, `attention` and `dropout` of `build_unet` for images of a size.

    Raises:
        ValueError: for a size without a preset.
    """
    if image_size not in PRESETS:
        raise ValueError(f"there are presets for {sorted(PRESETS)} pixels, not {image_size}")
    return dict(PRESETS[image_size])


def null_class(num_classes: int) -> int:
    """The label that stands for no class."""
    return num_classes


def build_unet(
    *,
    image_size: int,
    image_channels: int,
    num_classes: int,
    channels: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    dropout: float,
    conditions: int = 0,
) -> UNet2DModel:
    """A U-Net that predicts the noise of images [n, C, H, W] at timesteps [n] for labels [n].

    The label embedding is added to the time embedding (the public CBDM code does the same).

    Args:
        channels: one number a level, the first at full resolution; each level halves it.
        blocks: residual blocks a level.
        attention: resolutions with self-attention.
        conditions: planes that are shown beside the image's channels, and not predicted.

    Raises:
        ValueError: if the image cannot be halved that often.
    """
    if image_size % 2 ** (len(channels) - 1):
        raise ValueError(f"{image_size} pixels cannot be halved {len(channels) - 1} times")
    from diffusers import UNet2DModel

    from diffult_ray.models.dropout import replace_dropout

    attends = [image_size // 2**level in attention for level in range(len(channels))]
    return replace_dropout(UNet2DModel(
        sample_size=image_size,
        in_channels=image_channels + conditions,
        out_channels=image_channels,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=blocks,
        dropout=dropout,
        norm_num_groups=min(32, channels[0] // 2, *channels),
        attention_head_dim=None,  # one head, as wide as its level
        num_class_embeds=num_classes + 1,
    ))
