"""Classifiers: each is `features` (penultimate, [n, d]) followed by one linear `head`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class Classifier(nn.Module):
    """Images [n, C, H, W] float (normalised) -> logits [n, classes]."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [n, d]."""
        return self.backbone(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class NormedLinear(nn.Linear):
    """Features [n, d] -> logits s cos(w_c, f) [n, C]: the last layer of LDAM (Cao et al., 2019, public code).

    The public code leaves the scale s to the loss; here it is in the logits, so that their softmax is
    what the loss has trained. Half precisions are raised to float32, also under autocast.
    """

    def __init__(self, width: int, num_classes: int, scale: float) -> None:
        super().__init__(width, num_classes, bias=False)
        self.scale = scale
        with torch.no_grad():
            self.weight.copy_(functional.normalize(self.weight, dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            exact = features.to(torch.promote_types(features.dtype, torch.float32))
            directions = functional.normalize(self.weight.to(exact.dtype), dim=1)
            return self.scale * functional.linear(functional.normalize(exact, dim=1), directions)


def _convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    )


def _cnn(*, channels: int, image_size: int, num_classes: int, width: int = 16) -> Classifier:
    """Three convolutions and global average pooling, for images of about 8x8."""
    backbone = nn.Sequential(
        _convolution(channels, width),
        _convolution(width, 2 * width, stride=2),
        _convolution(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Classifier(backbone, 2 * width, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: strided, padded with zero channels."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.extra = stride, outside - inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.bn2(self.conv2(y)))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if not self.extra:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def _resnet32(*, channels: int, image_size: int, num_classes: int) -> Classifier:
    """ResNet-32 for 32x32 images (He et al., 2016, section 4.2): 0.46 M parameters for 3 channels."""
    blocks: list[nn.Module] = [_convolution(channels, 16)]
    for level, (inside, outside) in enumerate([(16, 16), (16, 32), (32, 64)]):
        blocks.append(BasicBlock(inside, outside, 1 if level == 0 else 2))
        blocks += [BasicBlock(outside, outside, 1) for _ in range(4)]
    backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return Classifier(backbone, 64, num_classes)


SMALL = 64  # images of up to this side keep their resolution through the stem


def _imagenet_resnet(block: str, layers: tuple[int, int, int, int]) -> Callable[..., Classifier]:
    """torchvision's ResNet of that many blocks a level (He et al., 2016, table 1)."""

    def build(*, channels: int, image_size: int, num_classes: int) -> Classifier:
        from torchvision.models import resnet

        backbone = resnet.ResNet(getattr(resnet, block), list(layers), num_classes=num_classes)
        width, backbone.fc = backbone.fc.in_features, nn.Identity()
        _fit_stem(backbone, channels, image_size)
        return Classifier(backbone, width, num_classes)

    return build


def _fit_stem(backbone: nn.Module, channels: int, image_size: int) -> None:
    """7x7 with stride 2 and pooling, or, where that would leave too little of an image, 3x3 alone."""
    if image_size <= SMALL:
        backbone.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    elif channels != 3:
        backbone.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")


ARCHITECTURES: dict[str, Callable[..., Classifier]] = {
    "cnn": _cnn,
    "resnet32": _resnet32,
    "resnet10": _imagenet_resnet("BasicBlock", (1, 1, 1, 1)),
    "resnet18": _imagenet_resnet("BasicBlock", (2, 2, 2, 2)),
    "resnet50": _imagenet_resnet("Bottleneck", (3, 4, 6, 3)),
}


def build_classifier(
    *, architecture: str, num_classes: int, channels: int, image_size: int, scale: float | None = None
) -> Classifier:
    """A classifier by name.

    Args:
        scale: of the cosines that are its logits (`NormedLinear`); None for a linear head.

    Raises:
        ValueError: for an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is one of {sorted(ARCHITECTURES)}, not {architecture!r}")
    model = ARCHITECTURES[architecture](
        channels=channels, image_size=image_size, num_classes=num_classes
    )
    if scale is not None:
        model.head = NormedLinear(model.head.in_features, num_classes, scale)
    return model
