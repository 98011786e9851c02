"""Tiny GPTQ checkpoints, packed value by value as GPTQ-for-LLaMa's format says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.unit.engine.checkpoint.makers import tiny_state
from tests.unit.engine.checkpoint.quantised_makers import word

# Groups of 32 divide every width.
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def pack_rows(codes_KN: Tensor) -> Tensor:
    """Eight values of a column into one word, the first into the lowest nibble: [K/8, N]."""
    rows = codes_KN.tolist()
    return torch.tensor(
        [
            [word(*(rows[8 * block + place][column] for place in range(8))) for column in range(n)]
            for n in [codes_KN.shape[1]]
            for block in range(codes_KN.shape[0] // 8)
        ],
        dtype=torch.int32,
    )


def make_linear(
    outputs: int, inputs: int, group: int, generator: torch.Generator, *, sym: bool, bias: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors and its weights fp32 [N, K]; stored zeros are true ones minus `bias`."""
    codes_NK = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zero_NR = torch.randint(1, 16, (outputs, inputs // group), generator=generator)
    zero_NR = torch.full_like(zero_NR, 8) if sym else zero_NR
    scale_NR = (torch.rand(zero_NR.shape, generator=generator) + 0.5).half()
    tensors = {
        "qweight": pack_rows(codes_NK.T),
        "qzeros": pack_rows(zero_NR - bias).T.contiguous(),
        "scales": scale_NR.T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // group,
    }
    groups_NRG = codes_NK.unflatten(1, (-1, group)) - zero_NR[:, :, None]
    return tensors, (groups_NRG * scale_NR[:, :, None].float()).flatten(1)


def make_state(
    group: int, *, sym: bool = False, bias: int = 1, **overrides: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors, and stem -> weights of its linear layers; group -1 is a whole row."""
    generator = torch.Generator().manual_seed(group + 7)
    state, weights = {}, {}
    for name, tensor in tiny_state(**{**SHAPE, **overrides}).items():
        stem = name.removesuffix(".weight")
        if not stem.endswith("_proj"):
            state[name] = tensor
            continue
        outputs, inputs = tensor.shape
        length = inputs if group == -1 else group
        made, weights[stem] = make_linear(outputs, inputs, length, generator, sym=sym, bias=bias)
        state |= {f"{stem}.{suffix}": value for suffix, value in made.items()}
    return state, weights
