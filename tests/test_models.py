"""Sizes known from the literature, and forward passes from 8x8 grey to 224x224 colour."""

from pathlib import Path

import pytest
import torch

from diffult_ray.models import build_classifier, build_unet, unet_preset
from diffult_ray.models.__main__ import _short, parameters, table
from diffult_ray.models.classifiers import ARCHITECTURES

KNOWN = [  # He et al. (2016), torchvision
    ("resnet32", 32, 3, 10, 464_154),
    ("resnet32", 32, 3, 100, 470_004),
    ("resnet18", 224, 3, 1000, 11_689_512),
    ("resnet50", 224, 3, 1000, 25_557_032),
]


@pytest.mark.parametrize(("name", "size", "channels", "classes", "count"), KNOWN)
def test_parameters(name, size, channels, classes, count):
    with torch.device("meta"):
        model = build_classifier(architecture=name, num_classes=classes, channels=channels, image_size=size)
    assert parameters(model) == count


def test_the_papers_unet_has_36_million_parameters():
    with torch.device("meta"):
        model = build_unet(image_size=32, image_channels=3, num_classes=100, **unet_preset(32))
    assert parameters(model) == pytest.approx(35.7e6, rel=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3), (224, 3)])
def test_classifier_shapes(name, size, channels):
    with torch.device("meta"):
        model = build_classifier(architecture=name, num_classes=7, channels=channels, image_size=size)
        features = model.features(torch.empty(2, channels, size, size))
        assert features.shape == (2, model.head.in_features)
        assert model(torch.empty(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("name", "size", "channels"), [
    ("cnn", 8, 1), ("resnet32", 28, 1), ("resnet10", 8, 1), ("resnet10", 32, 3), ("resnet10", 224, 3),
])
def test_gradients_reach_every_weight(name, size, channels):
    torch.manual_seed(0)
    model = build_classifier(architecture=name, num_classes=3, channels=channels, image_size=size)
    logits = model(torch.randn(2, channels, size, size))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_small_images_keep_their_resolution():
    """At 32 pixels the last level of ResNet-10 still has 4x4 positions, at 224 it has 7x7."""
    for size, left in ((32, 4), (64, 8), (65, 3), (224, 7)):
        with torch.device("meta"):
            model = build_classifier(architecture="resnet10", num_classes=3, channels=3, image_size=size)
            found: list[torch.Size] = []
            last = model.backbone.layer4
            last.register_forward_hook(lambda m, i, out, found=found: found.append(out.shape))
            model(torch.empty(1, 3, size, size))
        assert found == [(1, 512, left, left)]


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_unet_shapes_with_small_widths(size, channels):
    preset = unet_preset(size)
    preset |= {"channels": [8 * 2 ** min(i, 1) for i in range(len(preset["channels"]))], "blocks": 1}
    model = build_unet(image_size=size, image_channels=channels, num_classes=5, **preset).eval()
    x, t, y = torch.randn(2, channels, size, size), torch.tensor([0, 999]), torch.tensor([5, 0])
    with torch.no_grad():
        found = model(x, t, y).sample
    assert found.shape == x.shape and found.isfinite().all()


def test_attention_below_the_widest_level():
    preset = {"channels": (16, 32, 64), "blocks": 1, "attention": (8, 4), "dropout": 0.0}
    model = build_unet(image_size=8, image_channels=1, num_classes=2, **preset)
    blocks = (model.down_blocks[0], model.down_blocks[1], model.mid_block)
    assert [block.attentions[0].heads for block in blocks] == [1, 1, 1]


def test_224_colour_unet_with_small_widths():
    model = build_unet(image_size=224, image_channels=3, num_classes=2, channels=(8, 8, 8), blocks=1,
                       attention=(), dropout=0.0).eval()
    with torch.no_grad():
        found = model(torch.randn(1, 3, 224, 224), torch.tensor([10]), torch.tensor([1])).sample
    assert found.shape == (1, 3, 224, 224)


def test_unknown_names():
    with pytest.raises(ValueError, match="architecture is one of"):
        build_classifier(architecture="vgg", num_classes=2, channels=3, image_size=32)
    with pytest.raises(ValueError, match=r"there are presets for \[8, 28, 32, 64\] pixels, not 48"):
        unet_preset(48)
    with pytest.raises(ValueError, match="28 pixels cannot be halved 3 times"):
        build_unet(image_size=28, image_channels=1, num_classes=2, **unet_preset(32))


def test_the_table_in_the_docs_is_the_commands():
    docs = Path(__file__).resolve().parents[1] / "docs" / "MODELS.md"
    assert docs.read_text() == "\n".join(table()) + "\n"


@pytest.mark.parametrize(("number", "text"), [
    (464_154, "464 k"), (4.09e9, "4.09 G"), (12, "12"), (25_557_032, "25.6 M"),
])
def test_short(number, text):
    assert _short(number) == text
