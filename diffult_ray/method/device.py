"""Where and in which precision a network runs: what pays on the device at hand."""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffult_ray import footprint
from diffult_ray.allotment import Allotment
from diffult_ray.method import blocks, native
from diffult_ray.method.attention import fold_attention

FEW_POSITIONS = 256
FEW_CHANNELS = 64
MEMORY_SHARE = 0.25
MAPS = 25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def prepare(given: Allotment) -> torch.device:
    """Set up this process for what it was given; its device.

    Raises:
        RuntimeError: if a GPU was asked for and there is none.
    """
    footprint.begin()
    torch.set_num_threads(max(1, int(given.cpus)))
    if given.keep_memory:
        _keep_freed_memory()
    return pick(given.gpus)


def compiled(model: torch.nn.Module, given: Allotment) -> torch.nn.Module:
    """The same network, through `torch.compile` where that was asked for.

    Inductor keeps what it has compiled in TORCHINDUCTOR_CACHE_DIR (the temporary folder), so that the next
    process of the same network does not wait for it again. On a CPU it does not pay: docs/RESULTS.md.
    Small networks wait for the launches of their kernels: as CUDA graphs a step has one.
    """
    if not given.compile:
        return model
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers' own
    return torch.compile(model, mode="reduce-overhead" if given.graphs else None, dynamic=False)


def images_at_once(unet: torch.nn.Module, device: torch.device, given: Allotment, *, guided: bool) -> int:
    """How many images a diffusers U-Net makes at a time: a power of two, from the memory of this hardware.

    From all of it, not from what is free just now, so that equal machines make equal images. A row takes
    some 25 float32 feature maps of the first width: 12.3 MiB of the paper's U-Net at 32x32 (measured: 25
    maps there, 21 to 23 in smaller ones, 10 in bf16).
    """
    row = MAPS * unet.config.block_out_channels[0] * unet.config.sample_size**2 * 4
    rows = MEMORY_SHARE * _memory(device, given) / row
    most = given.images_at_once(unet.config.sample_size, guided=guided)
    return min(most, 2 ** max(0, int(math.log2(max(1, rows / (1 + guided))))))


def _memory(device: torch.device, given: Allotment) -> float:
    """Bytes of this process's share of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * min(1.0, given.gpus)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # a container's limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total * min(1.0, given.cpus / (os.cpu_count() or 1))


@cache
def _keep_freed_memory() -> None:
    """A step's large tensors are new memory each time, whose pages the kernel clears; kept, they are reused.

    glibc's mallopt; elsewhere nothing is changed. What it is worth: docs/RESULTS.md.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick(gpus: float) -> torch.device:
    """The device of a process that was given `gpus` GPUs.

    Of a fraction of one, the process gets that fraction of the memory, and `torch.OutOfMemoryError`
    beyond it: Ray counts fractions, and bounds nothing.

    Raises:
        RuntimeError: if a GPU was asked for and there is none; a stage never falls back silently.
    """
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise RuntimeError(
            f"this stage was given {gpus:g} GPUs (CUDA_VISIBLE_DEVICES: {seen}), but torch sees none"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus, device)
    return device


def autocast(device: torch.device, precision: str, image_size: int) -> torch.autocast:
    """bf16 autocast where asked for; `auto` uses it where it pays.

    On a CPU that is from 16 pixels on, with bf16 instructions (tests/benchmarks/precision.py:
    1.7 to 2.1 times faster at 32x32, but 0.6 to 0.9 times for a U-Net at 8x8).
    """
    enabled = uses_bf16(device, precision, image_size)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def uses_bf16(device: torch.device, precision: str, image_size: int) -> bool:
    """Whether `autocast` of the same has an effect."""
    return precision == "bf16" or (
        precision == "auto" and _multiplies_bf16(device) and _is_large(device, image_size)
    )


def memory_format(
    device: torch.device,
    image_size: int,
    *,
    network: str,
    trains: bool = True,
    in_c: bool = False,
) -> torch.memory_format:
    """channels-last where it pays: on GPUs, on CPUs from 16 pixels on, but not where torch's U-Net trains.

    On a CPU that, with its group norms, trains faster contiguous (bf16 at 32x32: 1.7 times against 1.2
    times, tests/benchmarks/precision.py).

    Args:
        network: "classifier" or "unet".
        in_c: norms are ours in C, which are made for channels-last, and so are wide convolutions.
    """
    lasts = network == "classifier" or not trains or in_c
    pays = device.type == "cuda" or (lasts and _is_large(device, image_size))
    return torch.channels_last if pays else torch.contiguous_format


def tuned(
    model: torch.nn.Module, given: Allotment, *, rounded: bool = False, trains: bool = True
) -> torch.nn.Module:
    """A diffusers U-Net as it is fastest on the device at hand; the same function but for rounding.

    In any case it takes m n labels for n images, as `blocks.several_labels` has it. Residual blocks do
    without what a plain one has no use for. Compiled on a GPU, all stays channels-last. On a CPU attention
    has two linear maps instead of four, and plain matrix products: torch's fused kernel is made for long
    sequences, and took 1.7 times as long for the 256 positions of 16x16; upsampling is one transposed
    convolution; and wide convolutions are Winograd's, but in bf16, whose 8 bits the transforms would spend.

    Args:
        rounded: it runs under bf16 autocast.
        trains: or is only evaluated, so that its weights can be rounded now, and not each time, and what
            Winograd's convolutions make of them is kept.
    """
    on_cpu = given.tuned and given.gpus <= 0
    blocks.several_labels(model, once=on_cpu)
    if not given.tuned:
        return model
    blocks.plain_residuals(model)
    if given.gpus > 0 and given.compile:
        blocks.channels_last_throughout(model)
    if on_cpu:
        blocks.one_last_activation(model)
        blocks.transposed_upsampling(model)
    if on_cpu and _attends(model) <= FEW_POSITIONS:
        fold_attention(model)
    if on_cpu and not rounded and not given.compile:
        blocks.winograd_convolutions(model, trains=trains)
    if rounded and not trains:
        for name, module in model.named_modules():
            # The first weights tell diffusers the type of its embeddings, which stay as they are; those of
            # upsampling are summed before they are rounded, those of attention multiplied.
            kept = name == "conv_in" or (on_cpu and ("upsamplers" in name or "attentions" in name))
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and not kept:
                module.to(torch.bfloat16)
    return model


def placed(
    model: torch.nn.Module, given: Allotment, on: torch.device, *, precision: str, trains: bool = True
) -> tuple[torch.nn.Module, torch.memory_format]:
    """A diffusers U-Net as `tuned` arranges it, on its device, and the layout that it and its images have."""
    size = model.config.sample_size
    rounded = uses_bf16(on, precision, size)
    model = tuned(model, given, rounded=rounded, trains=trains)
    may = given.tuned and not given.compile and given.gpus <= 0
    in_c = blocks.has_winograd(model) or (may and rounded and native.available())
    layout = memory_format(on, size, network="unet", trains=trains, in_c=in_c)
    return model.to(on, memory_format=layout), layout


def placed_classifier(
    model: torch.nn.Module, given: Allotment, on: torch.device, *, precision: str, image_size: int
) -> tuple[torch.nn.Module, torch.memory_format, str]:
    """A classifier to be trained, on its device, the layout that it and its images have, and its precision.

    `tuned` and on a CPU, what lies between the convolutions of a ResNet's basic blocks is one pass, and in
    float32 the convolutions themselves are Winograd's: the same function but for rounding. Where all channels
    are few that is faster than bf16, and what `auto` takes, but with AMX, where it is not (docs/RESULTS.md).
    """
    layout = memory_format(on, image_size, network="classifier")
    model = model.to(on, memory_format=layout)
    may = given.tuned and not given.compile and on.type == "cpu" and layout == torch.channels_last
    has_amx = torch.cpu._is_amx_tile_supported()
    if may and precision == "auto" and _is_narrow(model) and not has_amx and native.available():
        precision = "float32"
    if may:
        blocks.rectified_residuals(model)
    if may and not uses_bf16(on, precision, image_size):
        blocks.winograd_convolutions(model, fewest=native.LANES)
    return model, layout, precision


def _is_narrow(model: torch.nn.Module) -> bool:
    return all(m.out_channels <= FEW_CHANNELS for m in model.modules() if isinstance(m, torch.nn.Conv2d))


def clip(
    parameters: Sequence[torch.nn.Parameter],
    most: float,
    whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """`torch.nn.utils.clip_grad_norm_`, which on a CPU multiplies by no 1 where the norm is below `most`.

    On a GPU to know that would be to wait for it.

    Args:
        whole: where these are a part, the norm of each of their gradients to that of each of all.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if whole is None:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    else:  # as torch has it
        norm = torch.linalg.vector_norm(whole(torch.stack(torch._foreach_norm(gradients))))
    if norm.device.type == "cpu" and norm + 1e-6 <= most:
        return
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm, foreach=True)


def averaged(
    average: Any,
    parameters: Sequence[torch.nn.Parameter],
    given: Allotment,
    shadows: Sequence[torch.Tensor] | None = None,
) -> None:
    """One step of diffusers' `EMAModel`, whose shadows move towards the parameters in a single pass.

    Args:
        shadows: those of the parameters, where these are a part; only `tuned`.
    """
    if not given.tuned:
        average.step(parameters)
        return
    average.optimization_step += 1
    average.cur_decay_value = average.get_decay(average.optimization_step)
    shadows = average.shadow_params if shadows is None else shadows
    with torch.no_grad():
        torch._foreach_lerp_(shadows, parameters, 1 - average.cur_decay_value)


def _attends(unet: torch.nn.Module) -> int:
    """Positions that the highest resolution with attention has; 0 without any."""
    sides = [
        unet.config.sample_size // 2**level
        for level, kind in enumerate(unet.config.down_block_types) if kind.startswith("Attn")
    ]
    return max(sides, default=0) ** 2


def _is_large(device: torch.device, image_size: int) -> bool:
    return device.type == "cuda" or image_size >= 16


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
