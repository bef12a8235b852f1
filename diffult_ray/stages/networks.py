"""The network that measures: a stored reference classifier, or Inception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffult_ray import files

if TYPE_CHECKING:
    import torch

    Measured = tuple[torch.Tensor, torch.Tensor]
    Network = Callable[[np.ndarray], Measured]

BATCH = 512


def load_network(name: str, folder: str | Path, device: torch.device) -> Network:
    """A function from images [n, C, H, W] uint8 to features [n, d] and logits [n, classes] on the CPU.

    Args:
        name: `reference` or `inception`.
        folder: the network's artifact.
    """
    if name == "inception":
        from diffult_ray.method import inception

        weights = files.read_tensors(Path(folder) / "model.safetensors")
        network, batch = inception.build(weights).to(device), inception.BATCH[device.type]
        return _padded(lambda images: inception.outputs(network, images, device), batch)
    from diffult_ray.stages.classifier import load_classifier, outputs

    model, normalise = load_classifier(folder, device)
    return _padded(lambda images: outputs(model, normalise, images, device), BATCH)


def _padded(measure: Callable[[torch.Tensor], Measured], batch: int) -> Network:
    """In batches of one size, so that what is found of an image does not depend on its company."""
    import torch

    def network(images: np.ndarray) -> Measured:
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            filled = torch.from_numpy(np.resize(part, (batch, *part.shape[1:])))
            parts.append([found[: len(part)] for found in measure(filled)])
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(logits)

    return network
