"""Parts of diffusers' U-Net in other forms: the same functions but for rounding.

Each stands in for `forward` of a module, bound to it, so that weights and their names stay as they are.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch.nn import functional

from diffult_ray.method import native, winograd
from diffult_ray.method.normalised import silu_of_group_norm
from diffult_ray.method.rectified import relu_of_batch_norm
from diffult_ray.method.residual import basic_block
from diffult_ray.models.classifiers import BasicBlock
from diffult_ray.models.dropout import Drawn, Dropout

# Doubled pixels behind a 3x3 convolution are a transposed one of 4x4. In a row: of u, of w.
DOUBLED = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
LEAST_SIDE = 8
CONVOLUTION = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU)


def plain_residuals(unet: torch.nn.Module) -> None:
    """Residual blocks without diffusers' division by 1 and its copy in front of a shortcut."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_residual, module)


def one_last_activation(unet: torch.nn.Module) -> None:
    """The norm and the SiLU before the last convolution in one."""
    if isinstance(unet.conv_act, torch.nn.SiLU):
        unet.conv_norm_out.forward = MethodType(_normed_and_active, unet.conv_norm_out)
        unet.conv_act = torch.nn.Identity()


def transposed_upsampling(unet: torch.nn.Module) -> None:
    """Upsampling as one transposed convolution, with 16 products for each pixel to be doubled instead of 36.

    Nearest-neighbour upsampling and a 3x3 convolution see each pixel four times; a transposed convolution
    with a kernel of 4x4, sums of the 3x3's weights, sees it once. From 8x8 pixels on: for fewer, to make the
    kernel takes longer than it saves (docs/RESULTS.md).
    """
    for module in _upsamplers(unet):
        module.forward = MethodType(_upsample_transposed, module)


def winograd_convolutions(
    network: torch.nn.Module, *, fewest: int = winograd.FEWEST_CHANNELS, trains: bool = True
) -> None:
    """3x3 convolutions of so many channels by Winograd's algorithm, if a C compiler is at hand.

    Args:
        trains: or is only evaluated, and its weights do not change.
    """
    wide = [module for module in network.modules() if winograd.takes(module, fewest)]
    for module in wide if wide and native.available() else []:
        module.forward = MethodType(winograd.forward, module)
        if not trains:
            winograd.keep_numbers(module)


def rectified_residuals(classifier: torch.nn.Module) -> None:
    """ResNets, in whose residual blocks and first layer a batch norm, sum and ReLU are one pass."""
    from torchvision.models.resnet import BasicBlock as Torchvisions

    for module in classifier.modules():
        if isinstance(module, BasicBlock | Torchvisions):
            module.forward = MethodType(_basic, module)
        elif isinstance(module, torch.nn.Sequential) and tuple(map(type, module)) == CONVOLUTION:
            module.forward = MethodType(_convolution, module)


def has_winograd(unet: torch.nn.Module) -> bool:
    """Whether some convolutions are Winograd's, which are made for channels-last images."""
    return any(winograd.is_winograd(module) for module in unet.modules())


def several_labels(unet: torch.nn.Module, *, once: bool) -> None:
    """A network that takes m n labels for n images and their times: m for each, in turn (m = 1 as ever).

    For CBDM's two predictions, which are of the same noisy images.

    Args:
        once: compute once an image what its labels do not reach, as they are added behind a residual block's
            first convolution: the network's first convolution, the first block's and, of the last
            block's, the half that sees the first one's output.
    """
    once = once and _shares(unet)
    unet.forward = MethodType(_forward_once if once else _forward_repeated, unet)


def channels_last_throughout(unet: torch.nn.Module) -> None:
    """Activations and their gradients that stay channels-last from end to end where they are compiled.

    torch.compile takes a group norm apart into a view by groups, which channels-last images have not, so
    that they are copied to contiguous and back. diffusers makes what it upsamples contiguous from 64 images
    on, and the gradient of torch's upsampling adds up pixels one by one, in any order. The gradient of what
    is concatenated is a part of a larger tensor, which cuDNN copies first: 22 of the 65 convolutions of the
    paper's network had one or the other.
    """
    from diffusers.models.resnet import ResnetBlock2D

    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm) and module.affine:
            module.forward = MethodType(_group_norm, module)
        elif isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = MethodType(_residual_dense_backwards, module)
    for module in _upsamplers(unet):
        module.forward = MethodType(_upsample, module)


def _dense_backwards(x: torch.Tensor) -> torch.Tensor:
    """The same channels-last images as a view through their memory, by which a gradient must be dense, too.

    No autograd function: of one, some versions of torch.compile make an operator that DDP cannot take apart.
    """
    n, c, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, -1).view(n, height, width, c).permute(0, 3, 1, 2)


def _basic(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(block, BasicBlock):
        return basic_block(block, x, block.shortcut(x))
    return basic_block(block, x, x if block.downsample is None else block.downsample(x))


def _convolution(layers: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return relu_of_batch_norm(layers[1], layers[0](x))


def _is_plain(block: torch.nn.Module) -> bool:
    """Whether a residual block has no more in it than `_residual`."""
    return (
        block.output_scale_factor == 1 and block.time_embedding_norm == "default" and not block.skip_time_act
        and block.upsample is None and block.downsample is None and block.time_emb_proj is not None
        and isinstance(block.nonlinearity, torch.nn.SiLU)
    )


def _residual(block: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """A plain residual block of diffusers, of x [n, C, H, W] and embeddings [n or m n, d]."""
    embedded = _embedded(block, temb)
    if len(embedded) == len(x):
        h = _convolved(block.conv1, _active(block.norm1, x), embedded)
    else:
        h = winograd.summed(embedded[:, :, None, None], block.conv1(_active(block.norm1, x)))
    x = x if block.conv_shortcut is None else _pointwise(block.conv_shortcut, x)
    return _convolved(block.conv2, _active(block.norm2, h, block.dropout), aside=x)


def _embedded(block: torch.nn.Module, temb: torch.Tensor) -> torch.Tensor:
    return block.time_emb_proj(block.nonlinearity(temb))


def _convolved(
    conv: torch.nn.Conv2d,
    x: torch.Tensor,
    more: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
) -> torch.Tensor:
    """A convolution of x [m n, C, H, W], plus `more` [m n, K] and `aside` [n or m n, K, H, W]."""
    if winograd.is_winograd(conv):
        return conv(x, more, aside)
    return winograd.plus(conv(x), more, aside)


def _pointwise(conv: torch.nn.Conv2d, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    """A 1x1 convolution of x [m n, C, H, W], beside skip [n, D, H, W] where there is one.

    Of channels-last images on a processor it is a product of matrices, which is faster. The weights' gradient
    is then channels-last, as they are.
    """
    weight, by = conv.weight, functional.conv2d
    if x.is_contiguous(memory_format=torch.channels_last) and native.takes(x, narrow=True):
        weight, by = weight.permute(0, 2, 3, 1).flatten(1), _product
    if skip is None:
        return by(x, weight, conv.bias)
    c = x.shape[1]
    return winograd.summed(by(x, weight[:, :c], conv.bias), by(skip, weight[:, c:]))


def _product(x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return functional.linear(x.permute(0, 2, 3, 1), rows, bias).permute(0, 3, 1, 2)


def _active(
    norm: torch.nn.GroupNorm, x: torch.Tensor, dropout: torch.nn.Module | None = None
) -> torch.Tensor:
    if "forward" in vars(norm):  # one that stays channels-last
        y = functional.silu(norm(x))
        return y if dropout is None else dropout(y)
    drawn = dropout.draw(x) if isinstance(dropout, Dropout) else None
    y = _normed_and_active(norm, x, drawn)
    return y if dropout is None or drawn is not None else dropout(y)


def _normed_and_active(
    norm: torch.nn.GroupNorm, x: torch.Tensor, drawn: Drawn | None = None
) -> torch.Tensor:
    return silu_of_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, drawn)


def _residual_beside(
    block: torch.nn.Module, x: torch.Tensor, skip: torch.Tensor, temb: torch.Tensor
) -> torch.Tensor:
    """`_residual` of x [m n, C, H, W] beside skip [n, D, H, W], each image of it beside m of x."""
    norm, c = block.norm1, x.shape[1]

    def active(part: torch.Tensor, channels: slice) -> torch.Tensor:
        groups = norm.num_groups * part.shape[1] // norm.num_channels
        return silu_of_group_norm(part, groups, norm.weight[channels], norm.bias[channels], norm.eps)

    conv, weight = block.conv1, block.conv1.weight
    by = winograd.conv2d if winograd.is_winograd(conv) else winograd.direct
    aside = by(active(skip, slice(c, None)), weight[:, c:])
    h = by(active(x, slice(0, c)), weight[:, :c], conv.bias, _embedded(block, temb), aside)
    x = _pointwise(block.conv_shortcut, x, skip)
    return _convolved(block.conv2, _active(block.norm2, h, block.dropout), aside=x)


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


def _upsamplers(unet: torch.nn.Module) -> list[torch.nn.Module]:
    from diffusers.models.upsampling import Upsample2D

    return [m for m in unet.modules() if isinstance(m, Upsample2D) and _is_convolution_of_doubled(m)]


def _is_convolution_of_doubled(block: torch.nn.Module) -> bool:
    """Whether upsampling has no more in it than `_upsample`."""
    return (
        block.interpolate and block.use_conv and not block.use_conv_transpose and block.norm is None
        and block.name == "conv"
    )


def _upsample(block: torch.nn.Module, x: torch.Tensor, output_size: object = None) -> torch.Tensor:
    """Each pixel twice in both directions, and a convolution."""
    _only_doubles(output_size)
    n, c, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(n, height, 2, width, 2, c)
    doubled = pixels.reshape(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)
    return _dense_backwards(block.conv(doubled))


def _upsample_transposed(
    block: torch.nn.Module, x: torch.Tensor, output_size: object = None
) -> torch.Tensor:
    """The same, by one transposed convolution or one of Winograd's, which take fewer products."""
    _only_doubles(output_size)
    if winograd.is_winograd(block.conv) and winograd.pays(x, block.conv.weight, doubled=True):
        return winograd.forward(block.conv, x, doubled=True)
    if min(x.shape[2:]) < LEAST_SIDE:
        return block.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    with torch.autocast(x.device.type, enabled=False):
        weight = block.conv.weight
        rows = weight.new_tensor(DOUBLED)
        kernel = (weight.flatten(2) @ torch.kron(rows, rows).T).unflatten(2, (4, 4)).transpose(0, 1)
    return functional.conv_transpose2d(x, kernel, block.conv.bias, stride=2, padding=1)


def _only_doubles(output_size: object) -> None:
    """Raises ValueError for an `output_size`, which sides that are no power of two would need."""
    if output_size is not None:
        raise ValueError(f"upsampling doubles, and cannot make {output_size}")


def _shares(unet: torch.nn.Module) -> bool:
    """Whether the first and the last block are as `_forward_once` takes them apart."""
    first, last = unet.down_blocks[0].resnets[0], unet.up_blocks[-1].resnets[-1]
    channels, norm = unet.conv_in.out_channels, last.norm1
    return (
        _is_plain(first) and _is_plain(last) and last.conv_shortcut is not None
        and isinstance(unet.conv_act, torch.nn.SiLU)
        and channels % (norm.num_channels // norm.num_groups) == 0
    )


def _forward_repeated(
    unet: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> object:
    """diffusers' own forward pass, each image once a label."""
    each = len(class_labels) // len(sample)
    if each > 1:  # repeating loses the layout
        lasts = sample.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if lasts else torch.contiguous_format
        sample = sample.repeat(each, 1, 1, 1).contiguous(memory_format=layout)
        timestep = timestep.repeat(each)
    return type(unet).forward(unet, sample, timestep, class_labels)


def _forward_once(
    unet: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> object:
    """The same, of which each image's own part is computed once."""
    if len(sample) == len(class_labels):
        return type(unet).forward(unet, sample, timestep, class_labels)
    from diffusers.models.unets.unet_2d import UNet2DOutput

    embedded = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    labels = unet.class_embedding(class_labels).to(unet.dtype)
    temb = embedded.repeat(len(labels) // len(embedded), 1) + labels
    x = unet.conv_in(sample)
    skips = (x,)
    for block in unet.down_blocks:
        x, more = block(x, temb)
        skips += more
    x = unet.mid_block(x, temb)
    for block in unet.up_blocks[:-1]:
        own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        x = block(x, own, temb)
    x = _last_block(unet.up_blocks[-1], x, skips, temb)
    return UNet2DOutput(sample=unet.conv_out(unet.conv_act(unet.conv_norm_out(x))))


def _last_block(
    block: torch.nn.Module, x: torch.Tensor, skips: tuple[torch.Tensor, ...], temb: torch.Tensor
) -> torch.Tensor:
    """The last up block, at full resolution, whose last skip is the first convolution's output."""
    attentions = getattr(block, "attentions", [torch.nn.Identity()] * len(skips))
    for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
        if len(skip) == len(x):
            x = attention(resnet(torch.cat([x, skip], dim=1), temb))
        else:
            x = attention(_residual_beside(resnet, x, skip, temb))
    return x
