"""The table of parameters and FLOPs in docs/MODELS.md.

    python -m diffult_ray.models > docs/MODELS.md
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffult_ray.models.classifiers import build_classifier
from diffult_ray.models.unet import PRESETS, build_unet, unet_preset

# Architecture, image size, channels, classes.
CLASSIFIERS = (
    ("cnn", 8, 1, 10), ("resnet32", 28, 1, 10), ("resnet32", 32, 3, 10), ("resnet32", 32, 3, 100),
    ("resnet10", 64, 3, 100), ("resnet18", 64, 3, 100), ("resnet50", 64, 3, 100),
    ("resnet10", 224, 3, 1000), ("resnet18", 224, 3, 1000), ("resnet50", 224, 3, 1000),
)
UNET_IMAGES = {8: (1, 10), 28: (1, 10), 32: (3, 100), 64: (3, 100)}  # size -> channels, classes

HEAD = """# Models

Written by `python -m diffult_ray.models > docs/MODELS.md`. FLOPs are of one forward pass of one image,
as `torch.utils.flop_counter` counts them (a multiplication and an addition are two); a training step is
about three times as many. Images of up to 64 pixels keep their resolution through the stem of
ResNet-10, 18 and 50.
"""


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, *inputs: torch.Tensor) -> int:
    """FLOPs of one forward pass; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops()


def table() -> Iterator[str]:
    """The lines of docs/MODELS.md."""
    yield HEAD
    yield "| classifier | images | classes | parameters | FLOPs |"
    yield "|---|---|---|---|---|"
    yield from (_classifier_row(*each) for each in CLASSIFIERS)
    yield "\n| U-Net preset | images | classes | channels | attention | parameters | FLOPs |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_unet_row(size) for size in PRESETS)


def _classifier_row(name: str, size: int, channels: int, classes: int) -> str:
    with torch.device("meta"):
        model = build_classifier(architecture=name, num_classes=classes, channels=channels, image_size=size)
        cost = flops(model, torch.empty(1, channels, size, size))
    return f"| {name} | {size}x{size}x{channels} | {classes} | {_short(parameters(model))} | {_short(cost)} |"


def _unet_row(size: int) -> str:
    preset, (channels, classes) = unet_preset(size), UNET_IMAGES[size]
    with torch.device("meta"):
        model = build_unet(image_size=size, image_channels=channels, num_classes=classes, **preset)
        one = torch.zeros(1, dtype=torch.long)
        cost = flops(model, torch.empty(1, channels, size, size), one, one)
    widths, attention = (" ".join(map(str, preset[key])) for key in ("channels", "attention"))
    return (f"| {size} | {size}x{size}x{channels} | {classes} | {widths} | {attention} "
            f"| {_short(parameters(model))} | {_short(cost)} |")


def _short(number: float) -> str:
    """Three significant digits and a unit.

    >>> _short(464154), _short(4.09e9)
    ('464 k', '4.09 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g} {unit}"
    return str(number)


if __name__ == "__main__":
    print("\n".join(table()))
