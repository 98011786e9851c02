"""What every checkpoint reader hands on: lazy tensors under canonical names.

Canonical are the names of Hugging Face's Llama. File formats are known by the readers only.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import KV_CODE_MAX, KVStorage, QuantConfig
from engine.weights.deferred import Deferred
from engine.weights.types import Dense, Lazy, LinearWeights

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

# Scales of the cached keys and of the cached values of a layer.
KVPair = tuple[Tensor, Tensor]

# The dtypes that full-precision weights may be stored in.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Tensors that no Llama network has: pattern of the name -> what it means, with the remedy.
FOREIGN_TENSORS = (
    (
        r"lora_|\.adapter",
        "belongs to an adapter; merge the adapter into its base model first",
    ),
    (
        r"\.experts\.|block_sparse_moe|\.mlp\.gate\.|shared_expert",
        "belongs to a mixture of experts, which this network is not; use a dense checkpoint",
    ),
    (
        r"\.bias$",
        "is a bias, which this network does not have; use a checkpoint without biases",
    ),
    (
        r"[qk]_norm|[qk]_layernorm",
        "is a query/key norm, which this network does not have; use a checkpoint without it",
    ),
)


class TensorSource(ABC):
    """A tensor that is still in its file.

    `name` is the name in the file and `origin` the file, both for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of dim 0 as a fresh contiguous CPU tensor; reads only those bytes.

        A scalar is one row, returned with shape ().
        """

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.rows()

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def row_span(self, start: int, stop: int | None) -> tuple[int, int]:
        """`rows` arguments with the default filled in; asserts that they are inside the tensor."""
        height = self.shape[0] if self.shape else 1
        stop = height if stop is None else stop
        assert 0 <= start <= stop <= height, (self.name, start, stop, height)
        return start, stop


class TiedHead(TensorSource):
    """The embedding read as output head, while the file also stores a head of its own.

    Loaders disagree on which of the two wins when they differ, so each range that is read is
    compared and a difference is refused.
    """

    def __init__(self, embedding: TensorSource, copy: TensorSource) -> None:
        self.name, self.shape, self.dtype = embedding.name, embedding.shape, embedding.dtype
        self.origin = embedding.origin
        self.embedding, self.copy = embedding, copy

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        embedding_VE, head_VE = self.embedding.rows(start, stop), self.copy.rows(start, stop)
        if not torch.equal(embedding_VE.view(torch.uint8), head_VE.view(torch.uint8)):
            raise CheckpointError(
                f"{self.copy.origin}: {self.copy.name!r} differs from {self.embedding.name!r} "
                "although the config says tie_word_embeddings; correct that setting, or delete "
                "the tensor that is not meant"
            )
        return embedding_VE


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the network, in the order of the network."""
    width, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (kv_heads, width),
        "self_attn.v_proj": (kv_heads, width),
        "self_attn.o_proj": (width, heads),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{stem}.weight": shape for stem, shape in block.items()}
    return shapes | {FINAL_NORM: (width,), HEAD: (config.vocab_size, width)}


class Checkpoint:
    """The tensors of one model, none of them in memory. A context manager; `close` is final.

    where       path for messages
    config      the network's shape and constants
    dtype       the dtype that most weight bytes are stored in
    generation  token ids and sampling defaults found beside the weights
    tensors     canonical name -> source; with tied embeddings the head maps to the embedding
    dropped     tensors of the files that are known and not needed
    leftovers   tensors of the files that the network has no place for; `check` refuses them
    quant       what the files are quantised to; None for full precision
    kv_storage  the storage type of the KV cache that `kv_scales` belong to
    is_rope_known  whether the files give the base of the rotary embedding
    """

    quant: QuantConfig | None = None
    kv_storage: KVStorage = KVStorage.NONE
    is_rope_known: bool = True
    _given_kv: Sequence[KVPair] | None = None

    def __init__(
        self,
        where: str,
        config: ModelConfig,
        sources: Mapping[str, TensorSource],
        *,
        generation: Mapping[str, Any] | None = None,
        dropped: tuple[str, ...] = (),
        resources: ExitStack | None = None,
    ) -> None:
        """`sources`: everything in the files but `dropped`, under canonical names where known."""
        self.where = where
        self.config = config
        self.generation = dict(generation or {})
        self.dropped = dropped
        self._resources = resources or ExitStack()
        shapes = self.plain_shapes()
        sources = _tie(sources) if config.tie_word_embeddings else sources
        self.tensors: Mapping[str, TensorSource] = {
            name: sources[name] for name in shapes if name in sources
        }
        self.leftovers = {n: source for n, source in sources.items() if n not in shapes}
        self.dtype = _main_dtype(self.tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; sources cannot be read afterwards."""
        self._resources.close()

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor that `tensors` must hold."""
        return canonical_shapes(self.config)

    def linear(self, stem: str) -> LinearWeights:
        """The weights of the linear layer `stem`, a canonical name without '.weight'.

        Quantised ones are read and unpacked at once; CheckpointError if they cannot be right.
        """
        return Dense(Lazy.whole(self.tensors[f"{stem}.weight"]))

    def lazy_linear(self, stem: str) -> LinearWeights | Deferred:
        """As `linear`, but nothing is read before the values are asked for."""
        return self.linear(stem)

    @property
    def is_calibrated(self) -> bool:
        """Whether full-precision weights carry the scales of FP8."""
        weights = self.lazy_linear("model.layers.0.self_attn.q_proj")
        return isinstance(weights, Dense) and weights.input_scale is not None

    def give_kv_scales(self, scales: Sequence[KVPair], storage: KVStorage) -> None:
        """Let `scales`, one pair a layer, stand for what the files themselves say."""
        self._given_kv, self.kv_storage = scales, storage

    def cache_scales(self, layer: int, storage: KVStorage) -> KVPair | None:
        """`kv_scales` for a cache of type `storage`; None where no calibration is known."""
        found = self.kv_scales(layer) if self._given_kv is None else self._given_kv[layer]
        if found is None:
            return None
        factor = KV_CODE_MAX[self.kv_storage] / KV_CODE_MAX[storage]
        return found[0] * factor, found[1] * factor

    def kv_scales(self, layer: int) -> KVPair | None:
        """fp32 [1] or [kv heads] scales of the keys and of the values, cached value = code · scale.

        None if the files have none.
        """
        return None

    def check(self) -> None:
        """Raise CheckpointError unless the files hold exactly the network's tensors.

        Every tensor is there with the right shape and a floating dtype, and none is left over.
        Reads no weights.
        """
        shapes = self.plain_shapes()
        for name, source in self.leftovers.items():
            raise CheckpointError(
                f"{source.origin}: tensor {source.name!r} {self._foreign_reason(name)}"
            )
        missing = [name for name in shapes if name not in self.tensors]
        if missing:
            raise CheckpointError(self._missing_message(missing))
        for name, shape in shapes.items():
            _check_source(name, self.tensors[name], shape)

    def _foreign_reason(self, name: str) -> str:
        for pattern, reason in FOREIGN_TENSORS:
            if re.search(pattern, name):
                return reason
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= self.config.num_layers:
            return (
                f"belongs to layer {layer[1]} but the config says {self.config.num_layers} "
                "layers; use the config file that came with the weights"
            )
        return "has no place in a Llama network; use an unmodified Llama-architecture checkpoint"

    def _missing_message(self, missing: list[str]) -> str:
        if missing == [HEAD]:
            return (
                f"{self.where}: there is no {HEAD} although the config does not say "
                "tie_word_embeddings; set it to true if the head shares the embedding, otherwise "
                "download the checkpoint again"
            )
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return (
            f"{self.where}: tensor {missing[0]}{more} is missing from the weight files; download "
            "the checkpoint again and use the config file that came with it"
        )


def _check_source(name: str, source: TensorSource, shape: tuple[int, ...]) -> None:
    alias = "" if source.name == name else f" ({name})"
    if source.shape != shape:
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r}{alias} has shape {list(source.shape)} but "
            f"the config needs {list(shape)}; use the config file that came with the weights"
        )
    if source.dtype not in WEIGHT_DTYPES:
        kind = str(source.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r}{alias} is stored as {kind}, not as float64, "
            "float32, float16 or bfloat16; use a full-precision checkpoint"
        )


def _tie(sources: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Let head and embedding be one tensor; files may store either name, or both."""
    embedding, head = sources.get(EMBEDDING), sources.get(HEAD)
    if embedding is None or head is None:
        only = embedding or head
        return {**sources, EMBEDDING: only, HEAD: only} if only else dict(sources)
    if (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
        raise CheckpointError(
            f"{head.origin}: {head.name!r} with shape {list(head.shape)} and {head.dtype} cannot "
            f"be {embedding.name!r} with shape {list(embedding.shape)} and {embedding.dtype} "
            "although the config says tie_word_embeddings; correct that setting"
        )
    return {**sources, HEAD: TiedHead(embedding, head)}


def _main_dtype(tensors: Mapping[str, TensorSource]) -> torch.dtype:
    num_bytes: Counter[torch.dtype] = Counter()
    for source in tensors.values():
        num_bytes[source.dtype] += source.num_bytes
    return max(num_bytes, key=num_bytes.__getitem__, default=torch.float32)
