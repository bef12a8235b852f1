"""What is compiled for the processor at hand: where it is not, and a group norm with the SiLU behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from diffult_ray.method import blocks, device, native
from diffult_ray.method.normalised import group_norm, silu_of_group_norm
from diffult_ray.models.dropout import Dropout

compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler is at hand")


def given(n: int, channels: int, side: int, centre: float = 0.5, spread: float = 2.0) -> list[torch.Tensor]:
    """Channels-last images, weights and a bias."""
    rng = torch.Generator().manual_seed(0)
    x = centre + spread * torch.randn(n, channels, side, side, generator=rng)
    leaves = [x.contiguous(memory_format=torch.channels_last)]
    leaves += [torch.randn(channels, generator=rng) for _ in range(2)]
    return [each.requires_grad_() for each in leaves]


def usual(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.silu(functional.group_norm(x, groups, weight, bias, eps))


def results(function, leaves: list[torch.Tensor], groups: int) -> list[torch.Tensor]:
    """The output, and the gradients of its weighted sum."""
    x, weight, bias = leaves
    y = function(x, groups, weight, bias, 1e-5)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def doubled(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [each.detach().double().requires_grad_() for each in leaves]


# Groups of one channel, of some, and across sixteen; all in one.
SHAPES = [(3, 32, 8, 32), (2, 128, 16, 32), (5, 48, 4, 2), (1, 64, 1, 4), (2, 16, 9, 1)]


TORCHS = {silu_of_group_norm: usual, group_norm: functional.group_norm}


@compiles
@pytest.mark.parametrize("function", TORCHS)
@pytest.mark.parametrize(("n", "channels", "side", "groups"), SHAPES)
def test_a_group_norm_with_silu_and_without_is_torchs(n, channels, side, groups, function):
    leaves = given(n, channels, side)
    ours, exact = results(function, leaves, groups), results(TORCHS[function], doubled(leaves), groups)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for found, wanted in zip(ours, exact, strict=True):
        assert (found - wanted).norm() <= 2e-6 * wanted.norm()


@compiles
@pytest.mark.parametrize("function", TORCHS)
@pytest.mark.parametrize(("n", "channels", "side", "groups"), SHAPES)
def test_of_bf16_they_are_as_near_as_its_8_bits_allow(n, channels, side, groups, function):
    leaves = given(n, channels, side)
    rounded, torchs = [leaves[0].detach().bfloat16().requires_grad_(), *leaves[1:]], TORCHS[function]
    given_to = (function, rounded), (torchs, rounded), (torchs, doubled(rounded))
    found = [results(by, each, groups) for by, each in given_to]
    assert [each.dtype for each in found[0]] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for ours, usual, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= max(2**-8 * exact.norm(), 1.1 * (usual - exact).norm())
    for ours, exact in zip(found[0][2:], found[2][2:], strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


@compiles
@pytest.mark.parametrize(("n", "channels", "side", "groups"), SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_dropout_behind_them_keeps_what_it_drew(n, channels, side, groups, p):
    """In one pass, or apart where 16 does not divide the pixels."""
    leaves, dropout = given(n, channels, side), Dropout(p)
    torch.manual_seed(0)
    drawn = dropout.draw(leaves[0])

    def ours(*arguments) -> torch.Tensor:
        return silu_of_group_norm(*arguments, drawn)

    def apart(*arguments) -> torch.Tensor:
        torch.manual_seed(0)
        return dropout(usual(*arguments))

    found, exact = results(ours, leaves, groups), results(apart, doubled(leaves), groups)
    dropped = found[0] == 0
    assert torch.equal(dropped, exact[0] == 0) and dropped.float().mean() == pytest.approx(p, abs=0.1)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


@compiles
def test_in_bf16_a_dropout_keeps_the_same():
    leaves, dropout = given(3, 32, 8), Dropout(0.25)
    torch.manual_seed(0)
    drawn = dropout.draw(leaves[0])

    def ours(*arguments) -> torch.Tensor:
        return silu_of_group_norm(*arguments, drawn)

    exact = results(ours, leaves, 8)
    found = results(ours, [leaves[0].detach().bfloat16().requires_grad_(), *leaves[1:]], 8)
    assert torch.equal(found[0] == 0, exact[0] == 0)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()


@compiles
@pytest.mark.parametrize(("centre", "spread"), [(0, 1e-3), (1000, 1), (0, 1e4), (-5, 0)])
def test_it_loses_no_more_than_torch_where_numbers_are_large_or_alike(centre, spread):
    leaves = given(2, 32, 8, centre, spread)
    found = [results(each, leaves, 8) for each in (silu_of_group_norm, usual)]
    for ours, torchs, wanted in zip(*found, results(usual, doubled(leaves), 8), strict=True):
        assert (ours - wanted).abs().max() <= 2 * (torchs - wanted).abs().max() + 1e-6 * wanted.abs().max()


@compiles
def test_silu_far_from_zero():
    """A weight that makes numbers of -1e4 to 1e4 of what is normal: 0, or themselves."""
    x, _, bias = given(2, 16, 8)
    weight = torch.full((16,), 1e4, requires_grad=True)
    found = results(silu_of_group_norm, [x, weight, bias], 4)
    assert all(each.isfinite().all() for each in found)
    wanted = results(usual, doubled([x, weight, bias]), 4)
    assert (found[0] - wanted[0]).abs().max() < 0.05 and (found[0].min() > -0.3)


def test_it_is_torchs_own_where_c_does_not_fit():
    x, weight, bias = given(2, 32, 8)
    few = given(2, 24, 8)
    all_rounded = [each.bfloat16() for each in (x, weight, bias)]
    for leaves in ([x.contiguous(), weight, bias], few, doubled([x, weight, bias]), all_rounded):
        told = leaves[0], 8, *leaves[1:], 1e-5
        assert torch.equal(silu_of_group_norm(*told), usual(*told))
    with device.autocast(torch.device("cpu"), "bf16", 16):  # which may turn float32 into something else
        told = x, 8, weight, bias, 1e-5
        assert torch.equal(silu_of_group_norm(*told), usual(*told))


@pytest.mark.parametrize(
    ("environment", "told"),
    [({"PATH": "", "CC": ""}, ""), ({"CC": "false"}, "not compile"), ({"CC": "/no/cc"}, "not compile")],
)
def test_without_a_compiler_that_works_networks_stay_torchs(environment, told, monkeypatch, caplog):
    """No compiler is no fault; one that was named, or that fails, is told."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native.library.cache_clear()
    try:
        leaves = given(2, 32, 8)
        assert not native.available()
        told_of = leaves[0], 8, *leaves[1:], 1e-5
        assert torch.equal(silu_of_group_norm(*told_of), usual(*told_of))
        unet = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1))
        blocks.winograd_convolutions(unet)
        assert not blocks.has_winograd(unet)
        assert caplog.text.count("networks stay torch's") == bool(told) and told in caplog.text
    finally:
        native.library.cache_clear()


COMPILED = "from diffult_ray.method import native; assert native.available()"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A temporary folder of its own, and how often a compiler was asked to compile there."""
    log, command = tmp_path / "log", tmp_path / "cc"
    command.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {native.compiler()} "$@"\n')
    command.chmod(0o700)
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("CC", str(command))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "kept"))
    return lambda: log.read_text().count(" -o ") if log.exists() else 0


def processes(n: int) -> None:
    """So many at once that need it, each of which gets it."""
    started = [subprocess.Popen([sys.executable, "-c", COMPILED]) for _ in range(n)]
    assert [each.wait() for each in started] == [0] * n


@compiles
def test_one_process_compiles_for_all_and_again_where_that_is_no_library(counted, tmp_path):
    processes(3)
    assert counted() == 1
    [made] = (tmp_path / "kept").glob("*/*.so")
    made.write_bytes(b"")
    processes(1)
    assert counted() == 2
    processes(1)
    assert counted() == 2


@compiles
@pytest.mark.parametrize("theirs", ["writable", "link", "file"])
def test_nothing_is_loaded_from_where_others_can_write(counted, tmp_path, theirs):
    folder = tmp_path / "kept" / f"diffult-native-{os.getuid()}"
    if theirs == "writable":
        folder.mkdir()
        folder.chmod(0o770)
    elif theirs == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.touch()
    processes(1)
    assert counted() == 1
    assert list(folder.parent.iterdir()) == [folder]
    assert theirs == "file" or list(folder.iterdir()) == []


@compiles
def test_its_threads_are_torchs():
    """One OpenMP, whose number of threads torch sets: that which lies beside torch."""
    native.library()
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[-1] for line in lines if "libgomp" in line]
    assert maps and all("site-packages" in path for path in maps)
