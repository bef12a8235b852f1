"""Self-attention with one head as wide as its level, in two linear maps instead of four.

Of images' positions x, normalised, a head of the full width computes softmax(q k^T) v with q = x Wq^T + bq,
k = x Wk^T + bk and v = x Wv^T + bv, and a last map Wo, bo of that. q k^T is (x Wq^T Wk + bq Wk) x^T plus what
is the same in all of a row, which softmax does not see; and as a row of softmax sums to 1, the rest is
softmax(...) x (Wo Wv)^T + Wo bv + bo. Products of weights are small beside those of positions and weights.
The same function but for rounding.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch.nn import functional

from diffult_ray.method.normalised import group_norm


def fold_attention(unet: torch.nn.Module) -> None:
    """Attention of a diffusers U-Net in two linear maps, its products plain ones, and in its input's layout.

    diffusers' own gives back channels-last images, and all that comes after them stays so. Attention that has
    more in it than one head and its norm stays as it is.
    """
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention) and _is_plain(module):
            module.forward = MethodType(_attention, module)


def _is_plain(attn: torch.nn.Module) -> bool:
    biases = (each.bias for each in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]))
    return (
        attn.heads == 1 and attn.to_k.in_features == attn.to_q.in_features and attn.group_norm is not None
        and attn.spatial_norm is None and attn.norm_q is None and attn.norm_k is None
        and attn.residual_connection and attn.rescale_output_factor == 1 and attn.to_out[1].p == 0
        and all(bias is not None for bias in biases)
    )


def _attention(attn: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
    """Of x [n, C, H, W]; the embeddings, which diffusers gives it, have no part in it."""
    n, c, height, width = x.shape
    norm = attn.group_norm
    normed = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    positions = normed.permute(0, 2, 3, 1).reshape(n, height * width, c).contiguous()
    to_scores, scores_bias, to_output, output_bias = _folded(attn)
    seen = functional.linear(positions, to_scores, scores_bias)
    rows = torch.bmm(seen, positions.mT).softmax(dim=-1)
    found = functional.linear(torch.bmm(rows, positions), to_output, output_bias)
    images = found.view(n, height, width, c).permute(0, 3, 1, 2)
    return (images.contiguous() if x.is_contiguous() else images) + x


def _folded(attn: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [C, C] and biases [C] of the two maps; not rounded by autocast before they are multiplied.

    Keys' bias has no effect, and 0 for its gradient, which DDP waits for.
    """
    query, key, value, out = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]
    with torch.autocast(query.weight.device.type, enabled=False):
        return (
            attn.scale * (key.weight.T @ query.weight),
            attn.scale * torch.addmv(key.bias, key.weight.T, query.bias, beta=0),
            out.weight @ value.weight,
            torch.addmv(out.bias, out.weight, value.bias),
        )
