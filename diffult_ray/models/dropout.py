"""Dropout whose masks a processor draws several times as fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Drawn:
    """What a dropout drew.

    Attributes:
        bits: of each element, as int16, uniform.
        least: elements are kept whose bits reach it.
        scale: of what is kept.
    """

    bits: torch.Tensor
    least: int
    scale: float

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.bits >= self.least).to(x.dtype).mul_(self.scale)


class Dropout(torch.nn.Dropout):
    """On a CPU with 16 random bits an element, four elements a draw; elsewhere, or compiled, torch's own.

    There p is a multiple of 2^-16, and the bits are those of SFC64, seeded by torch's generator. It has no
    weights: networks with either are saved alike.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drawn = self.draw(x)
        return super().forward(x) if drawn is None else drawn.of(x)

    def draw(self, x: torch.Tensor) -> Drawn | None:
        """For a tensor of x's shape; None where the dropout is torch's own, or none."""
        dropped = round(self.p * 2**16)
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not on_cpu or not self.training or not 0 < dropped < 2**16:
            return None
        bits = np.random.SFC64(int(torch.randint(2**63 - 1, ()))).random_raw((x.numel() + 3) // 4)
        drawn = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)
        return Drawn(drawn, dropped - 2**15, 1 / (1 - dropped / 2**16))


def replace_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """The same network with this dropout in place of torch's."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))
    return model
