"""For a machine with a GPU: `make gpu`. Nothing here needs Ray but the sweeps in test_sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("torch sees no GPU: `make gpu` is for a machine that has one")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def exact():
    """float32 as it is, without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
