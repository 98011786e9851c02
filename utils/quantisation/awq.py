"""AWQ's clipping: the range of each group of weights that changes the layer's output least.

https://arxiv.org/abs/2306.00978, section 3.2 (weights are smoothed by a factor per input, then
clipped). Pure functions on tensors; knows no models and no files.
"""

# Dimensions: N outputs, K inputs, R groups along K, G inputs of a group, T tokens.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.checkpoint.awq_file import HIGHEST_CODE, LOWEST_CODE
from engine.errors import UserError

# Parts of the widest range that are tried; the first of equals is taken. The authors' code has 20
# steps down to one half as well.
CLIP_RATIOS = tuple(1 - step / 40 for step in range(21))
# Weights worked on at a time: 2 MB in fp32, so that most passes run in a core's cache.
CHUNK = 2**19
# Outputs of each matrix by which factors are compared.
SAMPLED_ROWS = 512


class GroupHessian:
    """Sums of x xᵀ over a layer's inputs x, cut to the G inputs of each group: fp32 [R, G, G].

    They give the squared change of the output that one group causes, which the mean square of
    each input alone would give only if inputs did not go together.
    """

    def __init__(self, inputs: int, group_size: int, device: torch.device) -> None:
        groups = inputs // group_size
        self.sum_RGG = torch.zeros(groups, group_size, group_size, device=device)

    def add(self, x: Tensor) -> None:
        """Take in the inputs [..., K]."""
        x_RTG = x.flatten(0, -2).float().unflatten(1, (len(self.sum_RGG), -1)).transpose(0, 1)
        self.sum_RGG.baddbmm_(x_RTG.mT, x_RTG)

    def check(self, stem: str) -> None:
        """Raise UserError if the inputs of the layer `stem` were not finite."""
        if not torch.isfinite(self.sum_RGG).all():
            raise UserError(
                f"the calibration gave {stem} inputs that are not finite; use --dtype bfloat16 or "
                "float32, and check the checkpoint and the calibration texts"
            )


def sample_rows(w_NK: Tensor) -> Tensor:
    """At most SAMPLED_ROWS rows from all over a matrix, a copy in fp32."""
    step = -(-len(w_NK) // SAMPLED_ROWS)
    return w_NK[::step].to(torch.float32, copy=True)


def choose_factor(
    factors: Sequence[Tensor], weights: Sequence[Tensor], hessian_RGG: Tensor
) -> Tensor:
    """The factor [K] of `factors` for layers that read the same input.

    The input is to be multiplied with it and each of `weights` fp32 [N, K] divided by it; the one
    that leaves the least squared error of the outputs after clipping is taken.
    """
    errors = []
    for factor_K in factors:
        smoothed_RGG = smooth_hessian(hessian_RGG, factor_K)
        found = [search_ranges(w_NK / factor_K, smoothed_RGG)[1] for w_NK in weights]
        errors.append(sum(error.item() for error in found))
    return factors[errors.index(min(errors))]


def smooth_hessian(hessian_RGG: Tensor, factor_K: Tensor) -> Tensor:
    """The Hessian of inputs that are multiplied with `factor_K`."""
    factor_RG = factor_K.view(len(hessian_RGG), -1)
    return hessian_RGG * factor_RG.unsqueeze(-1) * factor_RG.unsqueeze(-2)


def search_ranges(w_NK: Tensor, hessian_RGG: Tensor) -> tuple[Tensor, Tensor]:
    """The amax of each group, fp32 [N, R], and the squared error of all outputs, fp32 [].

    A scale is amax / 7 and the lowest code -8. So where the lowest weight is the largest in
    magnitude, the widest range that is tried is 7/8 of it, which clips nothing.
    """
    groups, size = hessian_RGG.shape[:2]
    chunks = w_NK.split(max(1, CHUNK // w_NK.shape[1]))
    found = [
        _search(w_MK.float().unflatten(1, (groups, size)).transpose(0, 1), hessian_RGG)
        for w_MK in chunks
    ]
    amax, errors = zip(*found, strict=True)
    return torch.cat(amax, dim=1).T.contiguous(), torch.stack(errors).sum()


def _search(w_RNG: Tensor, hessian_RGG: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [R, N] and the error of a few rows."""
    w_RNG = w_RNG.contiguous()
    lowest_RN = w_RNG.amin(-1) * (HIGHEST_CODE / LOWEST_CODE)
    widest_RN = torch.maximum(w_RNG.amax(-1), lowest_RN)
    # A group of zeros has no range; any does.
    widest_RN = torch.where(widest_RN > 0, widest_RN, 1.0)
    best_RN, least_RN = widest_RN, torch.full_like(widest_RN, torch.inf)
    errors_RNG, outputs_RNG = torch.empty_like(w_RNG), torch.empty_like(w_RNG)
    for ratio in CLIP_RATIOS:
        amax_RN = widest_RN * ratio
        scale_RN1 = (amax_RN / HIGHEST_CODE).unsqueeze(-1)
        torch.div(w_RNG, scale_RN1, out=errors_RNG).round_().clamp_(LOWEST_CODE, HIGHEST_CODE)
        errors_RNG.mul_(scale_RN1).sub_(w_RNG)
        torch.bmm(errors_RNG, hessian_RGG, out=outputs_RNG)
        error_RN = torch.linalg.vecdot(outputs_RNG, errors_RNG)
        best_RN = torch.where(error_RN < least_RN, amax_RN, best_RN)
        least_RN = torch.minimum(error_RN, least_RN)
    return best_RN, least_RN.sum()
