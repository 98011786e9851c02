"""The files of an `N-gpu` folder: the names and shapes that TensorRT-LLM's converters for Llama
gave them, shared by the reader (ft.py) and the writer (utils/ft_export.py).

A folder is config.ini, with one section [llama], beside raw row-major arrays without a header.
Linear layers are transposed to [inputs, outputs] and cut into one file per tensor-parallel rank:

  {stem}.weight.{rank}.bin            the storage type
  {stem}.weight.int8.{rank}.bin       int8 codes with one scale per matrix
  {stem}.weight.int8.col.{rank}.bin   int8 codes with one scale per output
  {stem}.scale_x_orig_quant.bin       fp32 [1]: 127 / largest input
  {stem}.scale_y_quant_orig.bin       fp32 [1]: largest output / 127; of q, k and v together, too
  {stem}.scale_w_quant_orig.….bin     fp32: largest weight / 127, see `FtLinear.scale`
  {stem}.scale_y_accum_quant.….bin    fp32: from sums of products of codes to codes of the output
  {stem}.smoother.{rank}.bin          fp32 [inputs]: what SmoothQuant divides the input by, where
                                      no norm before the layer can take that over

Ours are two files more of each layer, for keys and values apart; cached value = code · scale:

  model.layers.{i}.attention.{k,v}_cache.scale_quant_orig.bin        fp32 [1]
  model.layers.{i}.attention.{k,v}_cache.scale_quant_orig.head.bin   fp32 [kv heads]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint.base import EMBEDDING, FINAL_NORM, HEAD
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.mapping import Mapping, Span

CONFIG_FILE, SECTION = "config.ini", "llama"

STORAGE_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The names of tensors that every folder holds once -> the canonical ones.
TABLES = {"vocab_embedding": EMBEDDING, "ln_f": FINAL_NORM, "lm_head": HEAD}
NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}

QUERY_KEY_VALUE = "attention.query_key_value"


@dataclass(frozen=True)
class FtLinear:
    """One stored linear layer of a block: canonical `sources` side by side, outputs joined.

    Ranks hold parts of the inputs where it `is_row_parallel`, else of the outputs of each source.
    """

    name: str
    sources: tuple[str, ...]
    is_row_parallel: bool = False

    def stem(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.name}"

    def is_scale_cut(self, *, per_channel: bool) -> bool:
        """Whether each rank has a file of scales of its own: of q, k and v even where they are
        per matrix, repeated for every column, and of outputs that are cut among the ranks."""
        return len(self.sources) > 1 or (per_channel and not self.is_row_parallel)

    def scale(self, layer: int, what: str, rank: int, *, per_channel: bool) -> str:
        """File name of `what`, scale_w_quant_orig or scale_y_accum_quant."""
        column = "col." if per_channel else ""
        number = f"{rank}." if self.is_scale_cut(per_channel=per_channel) else ""
        return f"{self.stem(layer)}.{what}.{column}{number}bin"


LINEARS = (
    FtLinear(QUERY_KEY_VALUE, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    FtLinear("attention.dense", ("self_attn.o_proj",), is_row_parallel=True),
    # What the format calls gate is the up projection.
    FtLinear("mlp.fc", ("mlp.gate_proj",)),
    FtLinear("mlp.gate", ("mlp.up_proj",)),
    FtLinear("mlp.proj", ("mlp.down_proj",), is_row_parallel=True),
)
DENSE = LINEARS[1]


def cut(source: str, config: ModelConfig, mapping: Mapping) -> Span:
    """The outputs of a canonical matrix that a rank holds, or the inputs of a row-parallel one.

    With more ranks than KV heads several ranks hold the same head.
    """
    if source.startswith("mlp."):
        return mapping.even_span(config.intermediate_size)
    is_cached = source.endswith((".k_proj", ".v_proj"))
    heads = mapping.kv_head_span(config) if is_cached else mapping.head_span(config)
    return Span(heads.start * config.head_dim, heads.stop * config.head_dim)


def cache_scale(layer: int, which: str, suffix: str = "bin") -> str:
    """File of the scale of a layer's keys or values (`which` is k or v); `suffix` head.bin for
    one per head."""
    return f"model.layers.{layer}.attention.{which}_cache.scale_quant_orig.{suffix}"


class RawFile(NamedTuple):
    """A headerless file that should hold one array."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def check(self) -> None:
        """Raise CheckpointError unless the file is there and has the array's size."""
        try:
            size = self.path.stat().st_size
        except OSError:
            raise CheckpointError(
                f"{self.path}: is missing; convert the model again with hf_yi_convert.py"
            ) from None
        if size != self.num_bytes:
            kind = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.path}: has {size} bytes but {list(self.shape)} of {kind} are "
                f"{self.num_bytes}; the file is damaged or not of the model in {CONFIG_FILE}, "
                "convert the model again with hf_yi_convert.py"
            )

    def map(self) -> torch.Tensor:
        """The array, whose pages are read when they are touched."""
        storage = torch.UntypedStorage.from_file(
            str(self.path), shared=False, nbytes=self.num_bytes
        )
        return torch.empty(0, dtype=self.dtype).set_(storage).view(self.shape)
