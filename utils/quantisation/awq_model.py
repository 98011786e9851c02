"""AWQ of a whole model: what ModelOpt's search leaves to be done.

ModelOpt's: the quick search ("awq_lite") for a factor per input of every layer, which tries its
candidates without any clipping and for each layer alone. Ours: layers that read the same
activation, as q, k and v do, get one factor, since the engine joins them, and every group of
weights is clipped (utils.quantisation.awq). ModelOpt's own clipping runs every candidate over the
texts, which takes a CPU many times as long.
"""

# Dimensions: N outputs, K inputs, R groups along K, G inputs of a group.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.checkpoint.awq_file import STATE_DICT
from engine.checkpoint.base import Checkpoint
from engine.checkpoint.linear_layers import find_peers, linear_shapes
from engine.config import ModelConfig
from utils import log
from utils.quantisation.awq import (
    CHUNK,
    GroupHessian,
    choose_factor,
    sample_rows,
    search_ranges,
    smooth_hessian,
)


@contextmanager
def watch_inputs(
    model: nn.Module, config: ModelConfig, group_size: int
) -> Iterator[dict[tuple[str, ...], GroupHessian]]:
    """Hessians of what the model's linear layers read while it runs in this context.

    The keys are the stems of the layers that share an input. They hold 4 · K · group_size bytes
    each, for groups of 128 about 3 % of a model's weights in bfloat16.
    """
    hessians, hooks = {}, []
    for stem, (_, inputs) in linear_shapes(config).items():
        peers = find_peers(stem)
        if stem != peers[0]:
            continue
        linear = model.get_submodule(stem)
        hessian = hessians[peers] = GroupHessian(inputs, group_size, linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(_adder(hessian)))
    try:
        yield hessians
    finally:
        for hook in hooks:
            hook.remove()


def _adder(hessian: GroupHessian) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    @torch.no_grad()
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hessian.add(args[0])

    return add


@torch.no_grad()
def refine(
    state: dict[str, Tensor],
    checkpoint: Checkpoint,
    hessians: Mapping[tuple[str, ...], GroupHessian],
) -> None:
    """Replace factors, smoothed weights and ranges in the state dict that ModelOpt's search gave.

    The weights are the checkpoint's, smoothed anew, so that they are rounded once to the state's
    dtype; they are written in place. UserError for inputs that were not finite.
    """
    for stems, hessian in log.progress(hessians.items(), "clipping"):
        hessian.check(stems[0])
        factor_K = _common_factor(state, checkpoint, stems, hessian.sum_RGG)
        smoothed_RGG = smooth_hessian(hessian.sum_RGG, factor_K)
        for stem in stems:
            weight_NK = state[f"{stem}.weight"]
            _smooth(checkpoint.tensors[f"{stem}.weight"].read(), factor_K.cpu(), out=weight_NK)
            amax_NR, _ = search_ranges(weight_NK.to(smoothed_RGG.device), smoothed_RGG)
            state[f"{stem}.{STATE_DICT.scale}"] = amax_NR.reshape(-1, 1).cpu()
            state[f"{stem}.{STATE_DICT.pre_scale}"] = factor_K.to(weight_NK.dtype).cpu()


def drop_ones(state: dict[str, Tensor]) -> None:
    """Take out factors of one: a layer without a factor multiplies nothing at run time."""
    for name in [name for name in state if name.endswith(STATE_DICT.pre_scale)]:
        if (state[name] == 1).all():
            del state[name]


def _common_factor(
    state: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    stems: tuple[str, ...],
    hessian_RGG: Tensor,
) -> Tensor:
    """The best for `stems` of the factors that the search found for each, of their mean and of
    none at all: fp32 [K] with values that the weights' dtype has."""
    device, dtype = hessian_RGG.device, state[f"{stems[0]}.weight"].dtype
    found = [state[f"{stem}.{STATE_DICT.pre_scale}"].float() for stem in stems]
    mean_K = torch.stack(found).log().mean(dim=0).exp()
    factors = [factor.to(dtype).to(device).float() for factor in (*found, mean_K)]
    sources = [checkpoint.tensors[f"{stem}.weight"] for stem in stems]
    weights = [sample_rows(source.read()).to(device) for source in sources]
    return choose_factor([*factors, torch.ones_like(factors[0])], weights, hessian_RGG)


def _smooth(w_NK: Tensor, factor_K: Tensor, *, out: Tensor) -> None:
    """Write w_NK / factor_K to `out` with little more memory than the two."""
    rows = max(1, CHUNK // w_NK.shape[1])
    for from_MK, to_MK in zip(w_NK.split(rows), out.split(rows), strict=True):
        to_MK.copy_(from_MK.float() / factor_K)
