"""Dropout whose masks a processor draws four times as fast."""

from __future__ import annotations

import torch


class Dropout(torch.nn.Dropout):
    """On a CPU with 16 random bits an element, four elements a draw; elsewhere torch's own.

    There p is a multiple of 2^-16. It has no weights: networks with either are saved alike.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**16)
        if x.device.type != "cpu" or not self.training or not 0 < dropped < 2**16:
            return super().forward(x)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**16))


def replace_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """The same network with this dropout in place of torch's."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))
    return model
