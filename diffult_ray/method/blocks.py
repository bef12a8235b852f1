"""Parts of diffusers' U-Net in other forms: the same functions but for rounding.

Each stands in for `forward` of a module, bound to it, so that weights and their names stay as they are.
"""

from __future__ import annotations

from types import MethodType

import torch


def plain_residuals(unet: torch.nn.Module) -> None:
    """Residual blocks without diffusers' division by 1 and its copy in front of a shortcut."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_residual, module)


def plain_attention(unet: torch.nn.Module) -> None:
    """Attention by plain matrix products instead of torch's fused kernel, in the layout of its input.

    diffusers' own gives back channels-last images, and all that comes after them stays so.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor

    class Plain(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            found = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return found.contiguous() if hidden_states.is_contiguous() else found

    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(Plain())


def channels_last_throughout(unet: torch.nn.Module) -> None:
    """Activations and their gradients that stay channels-last from end to end where they are compiled.

    torch.compile takes a group norm apart into a view by groups, which channels-last images have not, so
    that they are copied to contiguous and back. diffusers makes what it upsamples contiguous from 64 images
    on, and the gradient of torch's upsampling adds up pixels one by one, in any order. The gradient of what
    is concatenated is a part of a larger tensor, which cuDNN copies first: 22 of the 65 convolutions of the
    paper's network had one or the other.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm) and module.affine:
            module.forward = MethodType(_group_norm, module)
        elif isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_residual_dense_backwards, module)
        elif isinstance(module, Upsample2D) and _is_convolution_of_doubled(module):
            module.forward = MethodType(_upsample, module)


def _dense_backwards(x: torch.Tensor) -> torch.Tensor:
    """The same channels-last images as a view through their memory, by which a gradient must be dense, too.

    No autograd function: of one, some versions of torch.compile make an operator that DDP cannot take apart.
    """
    n, c, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, -1).view(n, height, width, c).permute(0, 3, 1, 2)


def _is_plain(block: torch.nn.Module) -> bool:
    """Whether a residual block has no more in it than `_residual`."""
    return (
        block.output_scale_factor == 1 and block.time_embedding_norm == "default" and not block.skip_time_act
        and block.upsample is None and block.downsample is None and block.time_emb_proj is not None
    )


def _residual(block: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """A plain residual block of diffusers."""
    shift = block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    h = block.conv1(block.nonlinearity(block.norm1(x))) + shift
    h = block.conv2(block.dropout(block.nonlinearity(block.norm2(h))))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h


def _residual_dense_backwards(block: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    return _dense_backwards(_residual(block, x, temb))


def _group_norm(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Of [n, C, ...]: each channel's moments, its group's from those, then one scale and shift a channel.

    A group's variance is the mean of its channels' variances plus the variance of their means, so that
    nothing cancels. In float32 at least, as under autocast.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = (
        m.view(len(x), norm.num_groups, -1) for m in torch.var_mean(x, tuple(range(2, x.dim())), correction=0)
    )
    centre = mean.mean(2, keepdim=True)
    spread = variance.mean(2, keepdim=True) + (mean - centre).square().mean(2, keepdim=True)
    scale = torch.rsqrt(spread + norm.eps) * norm.weight.view(norm.num_groups, -1)
    shift = norm.bias.view(norm.num_groups, -1) - centre * scale
    a_channel = (len(x), -1, *(1,) * (x.dim() - 2))
    return x * scale.reshape(a_channel) + shift.reshape(a_channel)


def _is_convolution_of_doubled(block: torch.nn.Module) -> bool:
    """Whether upsampling has no more in it than `_upsample`."""
    return (
        block.interpolate and block.use_conv and not block.use_conv_transpose and block.norm is None
        and block.name == "conv"
    )


def _upsample(block: torch.nn.Module, x: torch.Tensor, output_size: object = None) -> torch.Tensor:
    """Each pixel twice in both directions, and a convolution.

    Raises:
        ValueError: for an `output_size`, which sides that are no power of two would need.
    """
    if output_size is not None:
        raise ValueError(f"upsampling doubles, and cannot make {output_size}")
    n, c, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(n, height, 2, width, 2, c)
    doubled = pixels.reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    return _dense_backwards(block.conv(doubled))
