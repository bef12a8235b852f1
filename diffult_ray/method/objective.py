"""What a generator learns from a batch: its random quantities, drawn whole, and each image's loss.

A batch's draws are a function of seed and step alone, and each rank takes its rows of them, so that
what is learnt does not depend on how many ranks share the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from diffult_ray.method.bands import ClassStatistics
from diffult_ray.method.conditions import draw_conditions, transformed, with_planes
from diffult_ray.method.diffusion import (
    aid_loss,
    cbdm_regulariser,
    ddpm_loss,
    edm_denoised,
    edm_input,
    edm_loss,
    edm_preconditioning,
    edm_sigmas,
    label_weights,
    make_noise_scheduler,
    predicted_image,
)

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """The random quantities of a batch of n images.

    Attributes:
        labels: y [n], the null class where the label was dropped.
        classes: the images' own classes [n].
        dropped: [n] bool.
        levels: [n] whole timesteps of DDPM, or sigmas of EDM.
        noise: [n, C, H, W].
        others: y' [n] of the regulariser; None without one, or where the whole batch is dropped.
        conditions: [n, 6], how the images are augmented; None for no augmentation.
    """

    labels: torch.Tensor
    classes: torch.Tensor
    dropped: torch.Tensor
    levels: torch.Tensor
    noise: torch.Tensor
    others: torch.Tensor | None = None
    conditions: torch.Tensor | None = None

    def only(self, rows: slice) -> Draw:
        """The draws of some rows of the batch."""
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v is not None})


class Guide:
    """How far images lie from their class in a frozen extractor's features, with gradients.

    Args:
        features: images [n, C, H, W] in [-1, 1] -> [n, d]; its weights need no gradients.
        statistics: of the real images in these features.
    """

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor], statistics: ClassStatistics) -> None:
        self.features, self.statistics = features, statistics

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`aid_loss` [n] of images, clamped to [-1, 1] first as a sampler does with its predictions."""
        known = self.statistics
        with torch.autocast(images.device.type, enabled=False):
            points = self.features(images.float().clamp(-1, 1)).double()
            if known.normalise:
                points = torch.nn.functional.normalize(points, dim=1)
            distance = (points - known.centre[labels]).norm(dim=1)
            return aid_loss(distance, known.scale[labels]).to(images.dtype)


class Objective:
    """The losses of a generator's configuration.

    Args:
        config: the section `generator`; keys that its choices leave without use may be missing.
        counts: [C] training images a class, on the device of training.
        guide: of the AID loss.

    Raises:
        ValueError: for an AID loss without a guide, or a regulariser that the objective has not.
    """

    def __init__(
        self, config: Mapping[str, Any], counts: torch.Tensor, guide: Guide | None = None
    ) -> None:
        if config["aid_weight"] > 0 and guide is None:
            raise ValueError("aid_weight is above 0, and there is no extractor to guide the loss")
        if config["objective"] == "edm" and config["regulariser"] != "none":
            raise ValueError(f"{config['regulariser']} is a regulariser of ddpm, not of edm")
        self.config, self.guide, self.null = config, guide, len(counts)
        self.is_edm, self.is_regularised = config["objective"] == "edm", config["regulariser"] == "cbdm"
        if self.is_regularised:
            sampled = (counts > 0).float() if config["balanced_batches"] else None
            self.weights = label_weights(counts, config["label_distribution"], sampled=sampled)

    @cached_property
    def noising(self) -> Any:
        return make_noise_scheduler(self.config["timesteps"])

    def draw(
        self, classes: torch.Tensor, shape: Sequence[int], rng: torch.Generator, coins: torch.Generator
    ) -> Draw:
        """Draw a whole batch's noise levels, noise, dropped labels, labels y' and augmentations.

        A batch whose labels are all dropped has no regulariser, as in the CBDM code.

        Args:
            classes: [n] of the whole batch, on the device of rng.
            shape: [C, H, W] of an image.
            coins: on the CPU, for which labels are dropped.
        """
        n, device = len(classes), rng.device
        if self.is_edm:
            levels = edm_sigmas(torch.randn(n, generator=rng, device=device))
        else:
            levels = torch.randint(0, self.config["timesteps"], (n,), generator=rng, device=device)
        noise = torch.randn(n, *shape, generator=rng, device=device)
        by_sample = self.config.get("label_drop_scope") == "sample"
        coin = torch.rand((n,) if by_sample else (), generator=coins) < self.config["label_drop"]
        others = None
        if self.is_regularised and not bool(coin.all()):
            others = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        conditions = None
        if self.config["augment"] > 0:
            conditions = draw_conditions(n, shape[-1], self.config["augment"], rng)
        dropped = coin.to(device, non_blocking=True).expand(n)
        labels = classes.masked_fill(dropped, self.null)
        return Draw(labels, classes, dropped, levels, noise, others, conditions)

    def losses(self, network: Network, x: torch.Tensor, drawn: Draw) -> torch.Tensor:
        """Loss [n] of each image.

        Args:
            network: (images and planes of conditions, times [n], labels [m n]) -> the U-Net's output [m n],
                float32, of m labels for each image, in turn; m is 2 for the regulariser.
            x: images [n, C, H, W] in [-1, 1].
            drawn: of these images.
        """
        if drawn.conditions is not None:
            x = transformed(x, drawn.conditions)
        return (self._edm if self.is_edm else self._ddpm)(network, x, drawn)

    def _ddpm(self, network: Network, x: torch.Tensor, drawn: Draw) -> torch.Tensor:
        noisy = self.noising.add_noise(x, drawn.noise, drawn.levels)
        predicted, other = _predictions(network, noisy, drawn)
        losses = ddpm_loss(predicted, drawn.noise)
        if other is not None:
            pull = cbdm_regulariser(
                predicted, other, drawn.levels,
                tau=self.config["tau"], total_timesteps=self.config["timesteps"],
            )
            losses = losses + pull.masked_fill(drawn.dropped, 0)
        if self.config["aid_weight"] > 0:
            kept = self.noising.alphas_cumprod.to(x.device)[drawn.levels]
            losses = losses + self._aid(predicted_image(noisy, predicted, kept), kept, drawn)
        return losses

    def _edm(self, network: Network, x: torch.Tensor, drawn: Draw) -> torch.Tensor:
        sigma = drawn.levels
        noisy = x + sigma.view(-1, 1, 1, 1) * drawn.noise
        shown = _shown(edm_input(noisy, sigma), drawn)
        output = network(shown, edm_preconditioning(sigma).noise, drawn.labels)
        denoised = edm_denoised(noisy, output, sigma)
        losses = edm_loss(denoised, x, sigma)
        if self.config["aid_weight"] > 0:
            losses = losses + self._aid(denoised, 1 / (1 + sigma.square()), drawn)
        return losses

    def _aid(self, predicted: torch.Tensor, kept: torch.Tensor, drawn: Draw) -> torch.Tensor:
        """lambda a times the AID loss [n], for images that have a label and are not augmented.

        Ours: the share of signal a = alpha-bar_t, which is 1 / (1 + sigma^2), weighs it. Near t = T
        x0_hat is the class's mean and an error of e is 1 / sqrt(a), some 150 times, as large in it,
        so that without the weight the loss would be about the noisiest images only.
        """
        penalty = kept * self.guide.loss(predicted, drawn.classes)
        without = drawn.dropped
        if drawn.conditions is not None:
            without = without | drawn.conditions.any(1)
        return self.config["aid_weight"] * penalty.masked_fill(without, 0)


def _shown(images: torch.Tensor, drawn: Draw) -> torch.Tensor:
    return images if drawn.conditions is None else with_planes(images, drawn.conditions)


def _predictions(
    network: Network, noisy: torch.Tensor, drawn: Draw
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """e, and e' where there are labels y'; the two share one forward pass."""
    shown = _shown(noisy, drawn)
    if drawn.others is None:
        return network(shown, drawn.levels, drawn.labels), None
    both = network(shown, drawn.levels, torch.cat([drawn.labels, drawn.others]))
    predicted, other = both.chunk(2)
    return predicted, other
