"""AWQ files of ModelOpt and its forerunner AMMO: a state dict (.pt) or an archive (.npz).

They hold smoothed weights in full precision with the scales that AWQ found, so the weights are
rounded here. A scale is amax / 7: codes are -7…7, and -8 where AWQ clips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.base import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    WEIGHT_DTYPES,
    Checkpoint,
    TensorSource,
)
from engine.checkpoint.hf import NOT_NEEDED, canonical_sources
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.npz_file import NpzFile
from engine.checkpoint.quant_groups import WHOLE_ROW, Groups, plan_groups
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_scale
from engine.checkpoint.quantised import (
    Field,
    LinearFormat,
    QuantisedCheckpoint,
    StoredLinear,
    sketch_groups,
)
from engine.checkpoint.quantised_file import find_file, merge_with_base, refuse_quantised_base
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError, UserError
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import BLOCK_BYTES, Int4Groups

LOWEST_CODE, HIGHEST_CODE = -8, 7


@dataclass(frozen=True)
class FileKind:
    """Names of a linear layer's tensors after its stem; a scale is `scale` divided by `divisor`."""

    scale: str
    pre_scale: str
    divisor: int


STATE_DICT = FileKind("weight_quantizer._amax", "input_quantizer._pre_quant_scale", HIGHEST_CODE)
ARCHIVE = FileKind("weights_scaling_factor", "prequant_scaling_factor", 1)

# Quantisers of a state dict that belong to the KV cache or are switched off.
UNUSED_QUANTISER = re.compile(r"\.(\w+_bmm_quantizer|output_quantizer)\.|\.input_quantizer\._amax$")
# Calibration of activations that an archive may hold beside the weights.
UNUSED_FACTOR = re.compile(r":(activation_scaling_factor|\w*cache_scaling_factor)$")

ARCHIVE_PREFIX = "_np:"
ARCHIVE_TABLES = {
    "vocab_embedding": EMBEDDING.removesuffix(".weight"),
    "final_layernorm": FINAL_NORM.removesuffix(".weight"),
    "lm_head": HEAD.removesuffix(".weight"),
}
# The names of the archive follow TensorRT-LLM, where mlp.gate is the up projection.
ARCHIVE_BLOCK = {
    "attention:qkv:q": "self_attn.q_proj",
    "attention:qkv:k": "self_attn.k_proj",
    "attention:qkv:v": "self_attn.v_proj",
    "attention:dense": "self_attn.o_proj",
    "mlp:fc": "mlp.gate_proj",
    "mlp:gate": "mlp.up_proj",
    "mlp:proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}
ARCHIVE_LAYER = re.compile(r"layers:(\d+):(.+)")


class SmoothedAwq(LinearFormat):
    """Smoothed weights [N, K] in full precision, scales of the file's groups and the factor of
    the input, which is 1 where the file has none.
    """

    def __init__(self, kind: FileKind, groups: Groups) -> None:
        self.kind, self.groups = kind, groups
        self.quant = QuantConfig(Algorithm.W4A16_AWQ, group_size=groups.engine)

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        groups = self.groups.count(inputs)
        count = outputs * groups
        return {
            "weight": Field(((outputs, inputs),), WEIGHT_DTYPES),
            self.kind.scale: Field(((outputs, groups), (count, 1), (count,)), SCALE_DTYPES),
            self.kind.pre_scale: Field(((inputs,), (1, inputs)), SCALE_DTYPES, is_required=False),
        }

    def unpack(self, linear: StoredLinear) -> Int4Groups:
        groups = self.groups.count(linear.inputs)
        scale_NR = read_scale(linear.tensors[self.kind.scale]).reshape(linear.outputs, groups)
        pre_scale_K, rescale_K = self._read_pre_scale(linear)
        codes_NK, scale_NR = round_rows(
            linear.tensors["weight"], scale_NR / self.kind.divisor, rescale_K
        )
        return Int4Groups(
            codes_NK=codes_NK,
            scale_NR=self.groups.spread(scale_NR, linear.inputs),
            group_size=self.groups.engine,
            pre_scale_K=pre_scale_K,
        )

    def sketch(self, linear: StoredLinear) -> Int4Groups:
        is_scaled = any(self.kind.pre_scale in peer for peer in linear.peers)
        return sketch_groups(linear, self.groups, has_pre_scale=is_scaled)

    def _read_pre_scale(self, linear: StoredLinear) -> tuple[Tensor | None, Tensor | None]:
        """The factor of the input, and what the weights are multiplied with to fit it (or None).

        Layers with one input get one factor: the mean of theirs.
        """
        name = self.kind.pre_scale
        if not any(name in peer for peer in linear.peers):
            return None, None
        ones_K = torch.ones(linear.inputs)
        factors = [
            read_scale(peer[name]).reshape(-1) if name in peer else ones_K for peer in linear.peers
        ]
        if all(torch.equal(factor_K, factors[0]) for factor_K in factors):
            return factors[0], None
        own_K = read_scale(linear.tensors[name]).reshape(-1) if name in linear.tensors else ones_K
        common_K = torch.stack(factors).mean(dim=0)
        return common_K, own_K / common_K


def round_rows(
    weight: TensorSource, scale_NR: Tensor, rescale_K: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 1…15 (0 where AWQ clips) [N, K] and scales fp32 [N, R] of smoothed weights.

    Weights that are multiplied with `rescale_K` get new scales, from the largest of each group.
    """
    outputs, inputs = weight.shape
    group = inputs // scale_NR.shape[1]
    codes_NK = torch.empty((outputs, inputs), dtype=torch.uint8)
    scale_NR = scale_NR.clone()
    step = max(1, BLOCK_BYTES // (4 * inputs))
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        block_NK = weight.rows(rows.start, rows.stop).float()
        if not torch.isfinite(block_NK).all():
            raise CheckpointError(
                f"{weight.origin}: tensor {weight.name!r} holds NaN or infinite values; the file "
                "is damaged or the quantisation failed, get a sound copy"
            )
        if rescale_K is not None:
            block_NK *= rescale_K
            amax_NR = block_NK.unflatten(1, (-1, group)).abs().amax(dim=-1)
            # A group of zeros keeps its scale.
            scale_NR[rows] = torch.where(amax_NR > 0, amax_NR / HIGHEST_CODE, scale_NR[rows])
        steps_NRG = block_NK.unflatten(1, (-1, group)) / scale_NR[rows].unsqueeze(-1)
        codes_NRG = steps_NRG.round_().clamp_(LOWEST_CODE, HIGHEST_CODE).sub_(LOWEST_CODE)
        codes_NK[rows] = codes_NRG.flatten(1).to(torch.uint8)
    return codes_NK, scale_NR


class UnsmoothedHead(TensorSource):
    """An output head whose columns AWQ divided by `factor_K`, multiplied back: fp32."""

    def __init__(self, weight: TensorSource, factor: TensorSource) -> None:
        self.name, self.shape, self.origin = weight.name, weight.shape, weight.origin
        self.dtype = torch.float32
        self.weight, self.factor = weight, factor

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.rows(start, stop).float() * read_scale(self.factor).reshape(1, -1)


def open_awq_file(path: Path, base: Checkpoint, group_size: int) -> QuantisedCheckpoint:
    """The model of `base` with the linear layers of the file, or of the one .npz in a directory.

    `group_size` is --group_size, -1 for one group per row. Raises UserError where it is not the
    file's, and CheckpointError for what is wrong with the file; the caller then closes `base`.
    """
    refuse_quantised_base(find_file(path), base)
    path = _find_archive(path) if path.is_dir() else path
    groups = plan_groups(group_size, base.config, "--group_size")
    with ExitStack() as stack:
        if path.suffix == ".npz":
            kind, file = ARCHIVE, stack.enter_context(closing(NpzFile(path)))
            dropped = tuple(name for name in file.tensors if UNUSED_FACTOR.search(name))
            own = {_canonical(n): s for n, s in file.tensors.items() if n not in dropped}
        elif path.suffix in (".pt", ".pth", ".bin"):
            kind, file = STATE_DICT, stack.enter_context(closing(TorchFile(path)))
            dropped = tuple(
                n for n in file.tensors if UNUSED_QUANTISER.search(n) or NOT_NEEDED.search(n)
            )
            own = canonical_sources({n: s for n, s in file.tensors.items() if n not in dropped})
        else:
            raise CheckpointError(
                f"--quant_ckpt_path {path} is no AWQ file (.pt or .npz); a directory with "
                "config.json, as AutoAWQ writes it, is given as --model_dir alone"
            )
        _check_group_size(path, own, base, group_size, kind)
        return merge_with_base(
            path,
            base,
            _unsmooth_head(own, kind),
            SmoothedAwq(kind, groups),
            dropped=dropped,
            resources=stack.pop_all(),
        )


def _find_archive(folder: Path) -> Path:
    archives = sorted(folder.glob("*.npz"))
    if len(archives) != 1:
        raise CheckpointError(
            f"--quant_ckpt_path {folder} holds {len(archives)} .npz files where one for tensor "
            "parallelism 1 is read, which serves any --tp_size; export the model with one rank, "
            "or give the file itself"
        )
    return archives[0]


def _canonical(name: str) -> str:
    """An archive's name as the canonical one; unknown names stay."""
    stem, _, suffix = name.removeprefix(ARCHIVE_PREFIX).rpartition(":")
    layer = ARCHIVE_LAYER.fullmatch(stem)
    if layer and layer[2] in ARCHIVE_BLOCK:
        return f"model.layers.{layer[1]}.{ARCHIVE_BLOCK[layer[2]]}.{suffix}"
    return f"{ARCHIVE_TABLES[stem]}.{suffix}" if stem in ARCHIVE_TABLES else name


def _unsmooth_head(own: Mapping[str, TensorSource], kind: FileKind) -> dict[str, TensorSource]:
    """The tensors with an output head in full precision: the engine does not quantise it."""
    sources = dict(own)
    stem = HEAD.removesuffix("weight")
    sources.pop(stem + kind.scale, None)
    factor = sources.pop(stem + kind.pre_scale, None)
    if factor is not None and HEAD in sources:
        sources[HEAD] = UnsmoothedHead(sources[HEAD], factor)
    return sources


def _check_group_size(
    path: Path,
    own: Mapping[str, TensorSource],
    base: Checkpoint,
    group_size: int,
    kind: FileKind,
) -> None:
    """Raise UserError if the file's first layer has groups of another size than the flag."""
    stem, (outputs, inputs) = next(iter(linear_shapes(base.config).items()))
    scale = own.get(f"{stem}.{kind.scale}")
    if scale is None:
        raise CheckpointError(
            f"--quant_ckpt_path {path} has no {kind.scale} for {stem}, so it is not an AWQ file "
            "for this model; check the path, and --model_dir"
        )
    found = outputs * inputs // max(1, torch.Size(scale.shape).numel())
    if found != (inputs if group_size == WHOLE_ROW else group_size):
        raise UserError(
            f"--group_size {group_size} differs from the {found} inputs per group of {path}; give "
            f"--group_size {found}"
        )
