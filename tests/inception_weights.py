"""Weights for torch-fidelity's InceptionV3 that no one has trained."""

from __future__ import annotations

import io

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Unloaded(FeatureExtractorInceptionV3):
    """As it is before it loads."""

    def load_state_dict(self, state_dict, *arguments, **options):
        return None


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict whose features differ between images."""
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    return network.state_dict()
