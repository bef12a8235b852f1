"""What each method minimises: the loss of an image, its weight, and how images are mixed.

| method | loss of an image | its weight |
|---|---|---|
| `ce`, `diffult`, `oversample` | cross-entropy | image |
| `reweight` | cross-entropy | image x inverse frequency |
| `balanced_softmax` | cross-entropy behind the class prior | image |
| `ldam_drw` | cross-entropy with class margins | image; from `drw_start` on x effective number |
| `mixup` | cross-entropy of two labels, as their images are mixed | image |

An image weighs 1, or omega if it is synthetic. Frequencies, priors, margins and effective numbers are
of the images trained on, synthetic ones counted by their weight (`classification.class_sizes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffult_ray.method import classification
from diffult_ray.method.classification import Mixing, Normalisation

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss of one method, on the device of its class weights.

    criterion: logits [n, C] and targets [n] -> losses [n].
    normalise: what a batch's weighted losses are divided by, its weight or its number of images.
    class_weights: [C], which images are weighed by from step `weighted_from` (counted from 0) on.
    mixup_alpha: of Beta(alpha, alpha); None mixes nothing.
    """

    criterion: Criterion = classification.cross_entropy
    normalise: Normalisation = "weight"
    class_weights: Tensor | None = None
    weighted_from: int = 0
    mixup_alpha: float | None = None

    def mixing(self, seed: int, step: int, n: int) -> Mixing | None:
        """How the batch of n images at a step is mixed, the same on every rank; None: not at all."""
        if self.mixup_alpha is None:
            return None
        return classification.draw_mixing(self.mixup_alpha, n, seed, step)

    def weights(self, labels: Tensor, weights: Tensor, step: int) -> Tensor:
        """[n] weights of images [n] at a step, by class where the method weighs classes."""
        if self.class_weights is None or step < self.weighted_from:
            return weights
        return weights * self.class_weights[labels]

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        *,
        step: int,
        rows: slice = slice(None),
        mixing: Mixing | None = None,
    ) -> Tensor:
        """The part of a batch's loss that some of its rows make: parts of all rows add up to it.

        Args:
            logits: [k, C] of the rows, mixed if they are to be.
            labels: [n] of the whole batch.
            weights: [n] float32 of the whole batch, 1 for a real image and omega for a synthetic one.
            step: from 0.
            rows: which of the n the k are.
            mixing: how the batch was mixed. A label's term has its own image's weight.
        """
        weights = self.weights(labels, weights, step)
        whole = classification.divisor(weights, self.normalise)  # a permutation of weights has their sum
        own = (weights[rows] * self.criterion(logits, labels[rows])).sum() / whole
        if mixing is None:
            return own
        partner = mixing.partner[rows].to(labels.device)
        other = (weights[partner] * self.criterion(logits, labels[partner])).sum() / whole
        return mixing.share * own + (1 - mixing.share) * other


def make_objective(
    config: Mapping[str, Any], labels: Tensor, weights: Tensor, *, num_classes: int, steps: int
) -> Objective:
    """The objective of `config["method"]`; plain cross-entropy without one.

    Args:
        config: of the classifier's stage: `method`, and those of `normalisation`, `max_margin`,
            `scale`, `drw_start` and `mixup_alpha` that it uses.
        labels: [n] of all images that are trained on.
        weights: [n], 1 for a real image and omega for a synthetic one.
        num_classes: C.
        steps: of the whole training.

    Raises:
        ValueError: if a method that goes by class has no image to train on.
    """
    method, normalise = config.get("method", "ce"), config.get("normalisation", "weight")
    sizes = classification.class_sizes(labels, weights, num_classes)
    if method == "reweight":
        by_class = classification.class_weights(sizes).to(weights)
        return Objective(normalise=normalise, class_weights=by_class)
    if method == "balanced_softmax":
        prior = classification.log_prior(sizes).to(weights)
        return Objective(_behind(prior), normalise)
    if method == "ldam_drw":
        margins = classification.ldam_margins(sizes, config["max_margin"]).to(weights)
        by_class = classification.drw_weights(sizes).to(weights)
        start = first_weighted_step(config["drw_start"], steps)
        return Objective(_within(margins, config["scale"]), normalise, by_class, start)
    return Objective(normalise=normalise, mixup_alpha=config.get("mixup_alpha"))


def first_weighted_step(share: float, steps: int) -> int:
    """The step (from 0) at which a share of all steps is done: 160 of 200 epochs for 0.8."""
    return math.ceil(share * steps - 1e-9)


def _behind(prior: Tensor) -> Criterion:
    return lambda logits, targets: classification.balanced_softmax_loss(logits, targets, prior)


def _within(margins: Tensor, scale: float) -> Criterion:
    return lambda logits, targets: classification.ldam_loss(logits, targets, margins, scale)
