"""Augmentation that the generator is told of: exact, encoded without loss, and of its probability."""

import pytest
import torch

from diffult_ray.method.conditions import CONDITIONS, draw_conditions, transformed, with_planes
from diffult_ray.models import build_unet
from tests.test_objective import Network, drawn, guide, objective

IMAGE = torch.arange(64.0).view(1, 1, 8, 8)


def conditions(*values):
    return torch.tensor([values], dtype=torch.float)


@pytest.mark.parametrize(("values", "expected"), [
    ((0, 0, 0, 0, 0, 0), IMAGE),
    ((1, 0, 0, 0, 0, 0), IMAGE.flip(3)),
    ((0, 1, 0, 0, 0, 0), IMAGE.flip(2)),
    ((0, 0, 1, 0, 0, 0), IMAGE.rot90(1, (2, 3))),
    ((0, 0, 1, 1, 0, 0), IMAGE.rot90(2, (2, 3))),
    ((0, 0, 0, 1, 0, 0), IMAGE.rot90(3, (2, 3))),
    ((1, 0, 1, 0, 0, 0), IMAGE.flip(3).rot90(1, (2, 3))),
    ((0, 0, 0, 0, 1, 0), IMAGE[..., [1, 0, 1, 2, 3, 4, 5, 6]]),  # right, and reflected at the left
    ((0, 0, 0, 0, 0, -1), IMAGE[:, :, [1, 2, 3, 4, 5, 6, 7, 6]]),  # up, and reflected below
])
def test_each_condition_is_its_transformation(values, expected):
    assert torch.equal(transformed(IMAGE, conditions(*values)), expected)


def test_each_image_has_its_own():
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 16, 16, generator=rng)
    found = draw_conditions(32, 16, 0.7, rng)
    together = transformed(images, found)
    for i in range(32):
        assert torch.equal(together[i : i + 1], transformed(images[i : i + 1], found[i : i + 1]))


def test_each_transformation_has_its_probability():
    found = draw_conditions(20_000, 32, 0.2, torch.Generator().manual_seed(0))
    assert found.shape == (20_000, CONDITIONS) and float(found.abs().max()) == 1
    shares = (found != 0).float().mean(0)
    assert shares[:2].tolist() == pytest.approx([0.1] * 2, abs=0.01)  # half of the chosen are mirrored
    assert float((found[:, 2:4] != 0).any(1).float().mean()) == pytest.approx(0.15, abs=0.01)
    assert shares[4:].tolist() == pytest.approx([0.2 * 8 / 9] * 2, abs=0.01)
    assert not draw_conditions(1000, 32, 0.0, torch.Generator().manual_seed(0)).any()


def test_the_network_is_shown_a_plane_a_condition_and_predicts_the_image_alone():
    shown = with_planes(IMAGE, conditions(1, 0, 0, 0, 0.5, -1))
    assert torch.equal(shown[:, :1], IMAGE)
    assert shown[0, 1:].mean((1, 2)).tolist() == [1, 0, 0, 0, 0.5, -1]
    model = build_unet(image_size=8, image_channels=1, num_classes=2, channels=(8, 8), blocks=1,
                       attention=(), dropout=0.0, conditions=CONDITIONS)
    with torch.no_grad():
        assert model(shown, torch.tensor([3]), torch.tensor([1])).sample.shape == IMAGE.shape


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_the_loss_is_of_the_transformed_image_with_its_planes(kind):
    made, seen = objective(objective=kind, augment=0.5), []

    def network(images, times, labels):
        seen.append(images)
        return torch.zeros_like(images[:, :1])

    x, found = drawn(made)
    losses = made.losses(network, x, found)
    assert bool(found.conditions.any())
    assert torch.equal(seen[0][:, 1:, 0, 0], found.conditions)
    plain, same = objective(objective=kind), drawn(objective(objective=kind))[1]
    by_hand = plain.losses(network, transformed(x, found.conditions), same)
    torch.testing.assert_close(losses, by_hand)


def test_an_augmented_image_is_not_held_to_the_bands_of_its_class():
    values = {"label_drop": 0, "augment": 0.3}
    made, plain = objective(guide(0.4), aid_weight=3.0, **values), objective(**values)
    x, found = drawn(made)
    network = Network()
    with torch.no_grad():
        extra = [o.losses(lambda i, t, y: network(i[:, :1], t, y), x, found) for o in (made, plain)]
    augmented = found.conditions.any(1)
    assert 0 < int(augmented.sum()) < 8
    assert bool(((extra[0] - extra[1])[augmented] == 0).all())
    assert bool(((extra[0] - extra[1])[~augmented] != 0).any())
