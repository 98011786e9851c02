"""Ranges of a network's activations over some texts, found with one decoder layer in memory.

All texts go through a layer before the next one is read, so a model larger than memory can be
calibrated. Everything is computed in fp32. Knows nothing of how ranges become scales.

Dimensions: T tokens of a batch   E model width   K inputs   G kv heads   D head size   V vocabulary
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint.base import EMBEDDING, Checkpoint
from engine.checkpoint.linear_layers import linear_shapes
from engine.config import ModelConfig
from engine.errors import CheckpointError, UserError
from engine.kernels import reference
from engine.layers.rope import RotaryEmbedding
from engine.weights import numerics
from engine.weights.types import Lazy

# Tokens that go through a layer at once.
BATCH_TOKENS = 4096
# Activations between two layers are kept in memory up to this size, and in a file above it.
SPILL_BYTES = 1 << 30
NORMS = ("input_layernorm", "post_attention_layernorm")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerRanges:
    """The largest magnitudes in one layer, fp32 on the CPU.

    inputs     linear layer, such as self_attn.q_proj -> of each channel of its input [K]
    outputs    the same -> of its whole output []; of queries and keys before RoPE
    keys_G     of each kv head's keys as a cache holds them, after RoPE
    values_G   of each kv head's values
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    keys_G: Tensor
    values_G: Tensor


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer's weights as read, linear ones and norms by name, fp32 on the CPU, and its ranges."""

    layer: int
    weights: dict[str, Tensor]
    ranges: LayerRanges


def calibrate(
    checkpoint: Checkpoint,
    samples: Sequence[Sequence[int]],
    *,
    device: torch.device,
    spill_dir: Path,
    progress: Progress = lambda done, total: None,
) -> Iterator[CalibratedLayer]:
    """Every layer in turn, with the ranges that token sequences `samples` have in it.

    `progress` is told layers. UserError if `spill_dir` has no room for the activations, and
    CheckpointError if they become NaN or infinite.
    """
    config = checkpoint.config
    # By length, so that a batch is a run of rows that needs no padding.
    ordered = sorted(samples, key=len)
    h_TE = _embed(checkpoint, [token for sample in ordered for token in sample], spill_dir)
    batches = list(_plan_batches([len(sample) for sample in ordered]))
    rope = RotaryEmbedding(config, device)
    for layer in range(config.num_layers):
        # Nothing here refers to a layer that was handed on, so its memory is the next one's.
        yield _calibrate_layer(checkpoint, layer, h_TE, batches, rope, device)
        progress(layer + 1, config.num_layers)


def _calibrate_layer(
    checkpoint: Checkpoint,
    layer: int,
    h_TE: Tensor,
    batches: Sequence[tuple[slice, int]],
    rope: RotaryEmbedding,
    device: torch.device,
) -> CalibratedLayer:
    """Take `h_TE`, in place, through a layer."""
    weights = _read_layer(checkpoint, layer)
    on_device = {name: weight.to(device) for name, weight in weights.items()}
    block = _Block(on_device, checkpoint.config)
    for rows, length in batches:
        h_TE[rows] = block(h_TE[rows].to(device), length, rope).cpu()
    ranges = block.ranges()
    _require_finite(checkpoint, layer, ranges)
    return CalibratedLayer(layer, weights, ranges)


class _Block:
    """One decoder layer that remembers how large its activations were."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._weights, self._config = weights, config
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._cached: dict[str, Tensor] = {}

    def __call__(self, h_TE: Tensor, length: int, rope: RotaryEmbedding) -> Tensor:
        """The residual stream after the layer; every `length` tokens are a text."""
        x_TE = self._norm("input_layernorm", h_TE)
        h_TE = h_TE + self._linear("self_attn.o_proj", self._attend(x_TE, length, rope))
        x_TE = self._norm("post_attention_layernorm", h_TE)
        gate_TF = F.silu(self._linear("mlp.gate_proj", x_TE))
        gated_TF = gate_TF.mul_(self._linear("mlp.up_proj", x_TE))
        return h_TE + self._linear("mlp.down_proj", gated_TF)

    def ranges(self) -> LayerRanges:
        def on_cpu(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: amax.cpu() for name, amax in found.items()}

        cached = on_cpu(self._cached)
        return LayerRanges(on_cpu(self._inputs), on_cpu(self._outputs), cached["k"], cached["v"])

    def _attend(self, x_TE: Tensor, length: int, rope: RotaryEmbedding) -> Tensor:
        q_THD, k_TGD, v_TGD = (
            self._linear(f"self_attn.{name}_proj", x_TE).unflatten(1, (-1, self._config.head_dim))
            for name in "qkv"
        )
        texts = len(x_TE) // length
        positions_T = torch.arange(length, device=x_TE.device).repeat(texts)
        angles = rope(positions_T, torch.full_like(positions_T, length))
        q_THD, k_TGD = reference.rope(q_THD, k_TGD, *angles)
        _widen(self._cached, "k", _amax(k_TGD, (0, 2)))
        _widen(self._cached, "v", _amax(v_TGD, (0, 2)))
        q, k, v = (x.unflatten(0, (texts, length)).transpose(1, 2) for x in (q_THD, k_TGD, v_TGD))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(len(x_TE), -1)

    def _norm(self, name: str, x_TE: Tensor) -> Tensor:
        return reference.rms_norm(x_TE, self._weights[name], self._config.rms_norm_eps)

    def _linear(self, name: str, x_TK: Tensor) -> Tensor:
        y_TN = x_TK @ self._weights[name].T
        _widen(self._inputs, name, _amax(x_TK, (0,)))
        _widen(self._outputs, name, numerics.amax_tensor(y_TN))
        return y_TN


def _widen(found: dict[str, Tensor], name: str, amax: Tensor) -> None:
    found[name] = torch.maximum(found[name], amax) if name in found else amax


def _amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.maximum(-x.amin(dims), x.amax(dims))


def _plan_batches(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """(rows of the tokens, length of each text in them) for texts that are ordered by length."""
    start = 0
    for length, group in groupby(lengths):
        left = len(list(group))
        while left:
            texts = min(left, max(1, BATCH_TOKENS // length))
            yield slice(start, start + texts * length), length
            start, left = start + texts * length, left - texts


def _read_layer(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    stems = [stem for stem in linear_shapes(checkpoint.config) if stem.startswith(prefix)]
    weights = {
        stem.removeprefix(prefix): numerics.dequantize(checkpoint.linear(stem)) for stem in stems
    }
    return weights | {
        name: checkpoint.tensors[f"{prefix}{name}.weight"].read().float() for name in NORMS
    }


def _embed(checkpoint: Checkpoint, tokens: Sequence[int], spill_dir: Path) -> Tensor:
    """The embeddings [T, E] of all tokens, the table read in blocks."""
    tokens_T = torch.tensor(tokens)
    table = Lazy.whole(checkpoint.tensors[EMBEDDING])
    h_TE = _allocate(len(tokens), table.shape[1], spill_dir)
    first = 0
    for block_VE in table.blocks():
        inside_T = ((tokens_T >= first) & (tokens_T < first + len(block_VE))).nonzero()[:, 0]
        for rows_T in inside_T.split(BATCH_TOKENS):
            h_TE[rows_T] = block_VE[tokens_T[rows_T] - first].float()
        first += len(block_VE)
    return h_TE


def _allocate(rows: int, width: int, spill_dir: Path) -> Tensor:
    """fp32 [rows, width], in a file that has no name any more if it is above SPILL_BYTES."""
    num_bytes = 4 * rows * width
    if num_bytes <= SPILL_BYTES:
        return torch.empty(rows, width)
    try:
        with tempfile.NamedTemporaryFile(dir=spill_dir) as file:
            # Written, not only sized: a full disk would end the process at some later store.
            for start in range(0, num_bytes, 1 << 24):
                file.write(bytes(min(1 << 24, num_bytes - start)))
            file.flush()
            storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=num_bytes)
    except OSError as error:
        raise UserError(
            f"--out-dir {spill_dir} cannot hold the {num_bytes / 1e9:.1f} GB of activations of a "
            f"calibration ({error.strerror}); free some space or lower --calib_size"
        ) from None
    return torch.empty(0).set_(storage).view(rows, width)


def _require_finite(checkpoint: Checkpoint, layer: int, ranges: LayerRanges) -> None:
    for name, amax in ranges.outputs.items():
        if not torch.isfinite(amax):
            raise CheckpointError(
                f"{checkpoint.where}: the output of model.layers.{layer}.{name} has NaN or "
                "infinite values while calibrating; the weights are damaged, get a sound copy"
            )
