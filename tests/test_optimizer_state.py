"""An optimizer that goes on from what was stored of it takes the steps that it would have taken."""

from __future__ import annotations

import pytest
import torch

from diffult_ray import files
from diffult_ray.snapshot import Snapshot
from diffult_ray.stages.training import load_optimizer, optimizer_tensors

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_in_any_memory_format(tmp_path, name, layout):
    def trained(stops: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(8, 16, 3).to(memory_format=layout)
        optimizer = OPTIMIZERS[name](model.parameters())
        for step in range(6):
            x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x.contiguous(memory_format=layout)).square().mean().backward()
            optimizer.step()
            if stops and step == 2:
                Snapshot().take(optimizer_tensors(optimizer), {}).write(tmp_path / "state")
                optimizer = OPTIMIZERS[name](model.parameters())
                load_optimizer(optimizer, files.read_state(tmp_path / "state")[0])
        return model.weight.detach()

    assert torch.equal(trained(stops=True), trained(stops=False))
