"""QuantConfig: how weights, activations and the KV cache are stored and computed.

`from_flags` is the only place where command-line flags become a mode. The bit mask that
TensorRT-LLM calls quant_mode is written for compatibility and never branched on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from engine.errors import UserError


class Algorithm(str, Enum):
    """Weight (and activation) quantisation of the linear layers."""

    NONE = "none"
    W8A16 = "w8a16"
    W4A16 = "w4a16"
    W4A16_AWQ = "w4a16_awq"
    W4A16_GPTQ = "w4a16_gptq"
    W8A8_SQ = "w8a8_sq"
    FP8 = "fp8"


class KVStorage(str, Enum):
    """Storage type of the KV cache; NONE stores the engine's dtype."""

    NONE = "none"
    INT8 = "int8"
    FP8 = "fp8"


# TensorRT-LLM's QuantMode bits.
INT4_WEIGHTS, INT8_WEIGHTS, ACTIVATIONS, PER_CHANNEL, PER_TOKEN, PER_GROUP = 1, 2, 4, 8, 16, 32
INT8_KV, FP8_KV, FP8_QDQ = 64, 128, 256

_ALGORITHM_BITS = {
    Algorithm.NONE: 0,
    Algorithm.W8A16: INT8_WEIGHTS,
    Algorithm.W4A16: INT4_WEIGHTS,
    Algorithm.W4A16_AWQ: INT4_WEIGHTS | PER_GROUP,
    Algorithm.W4A16_GPTQ: INT4_WEIGHTS | PER_GROUP,
    Algorithm.W8A8_SQ: INT8_WEIGHTS | ACTIVATIONS,
    Algorithm.FP8: FP8_QDQ,
}

_PRECISIONS = {
    "int8": Algorithm.W8A16,
    "int4": Algorithm.W4A16,
    "int4_awq": Algorithm.W4A16_AWQ,
    "int4_gptq": Algorithm.W4A16_GPTQ,
}

DEFAULT_GROUP_SIZE = 128
GROUP_MULTIPLE = 32
GROUPED = (Algorithm.W4A16_AWQ, Algorithm.W4A16_GPTQ)

# The largest code of a cache's storage type; a scale is the largest value over it.
KV_CODE_MAX = {KVStorage.INT8: 127.0, KVStorage.FP8: 448.0}

# Flag pairs that contradict each other, with the reason the user reads.
CLASHES = (
    ("use_smooth_quant", "use_weight_only", "choose one quantisation of the weights"),
    ("use_smooth_quant", "enable_fp8", "choose one quantisation of the weights"),
    ("use_weight_only", "enable_fp8", "choose one quantisation of the weights"),
    ("int8_kv_cache", "fp8_kv_cache", "the cache has one storage type"),
)


@dataclass(frozen=True)
class QuantConfig:
    """One engine's quantisation; `group_size` is 0 for ungrouped modes.

    `per_token` and `per_channel` belong to SmoothQuant: a scale per activation row computed at
    run time instead of a calibrated one, a weight scale per output channel instead of per tensor.
    `head` is how the output head is stored: in the engine's dtype, or as W8A16.
    """

    algorithm: Algorithm = Algorithm.NONE
    group_size: int = 0
    per_token: bool = False
    per_channel: bool = False
    kv: KVStorage = KVStorage.NONE
    head: Algorithm = Algorithm.NONE

    @property
    def quant_mode(self) -> int:
        """TensorRT-LLM's integer."""
        bits = _ALGORITHM_BITS[self.algorithm]
        bits |= PER_CHANNEL if self.per_channel else 0
        bits |= PER_TOKEN if self.per_token else 0
        return bits | {KVStorage.NONE: 0, KVStorage.INT8: INT8_KV, KVStorage.FP8: FP8_KV}[self.kv]

    def __str__(self) -> str:
        name = self.algorithm.value + (f" g{self.group_size}" if self.group_size else "")
        name += " per-token" if self.per_token else ""
        name += " per-channel" if self.per_channel else ""
        name += f", {self.head.value} head" if self.head is not Algorithm.NONE else ""
        return name + (f", {self.kv.value} KV cache" if self.kv is not KVStorage.NONE else "")

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        kinds = {"algorithm": self.algorithm, "kv": self.kv, "head": self.head}
        return {**values, **{name: kind.value for name, kind in kinds.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        kinds = {
            "algorithm": Algorithm(values["algorithm"]),
            "kv": KVStorage(values["kv"]),
            # Engines from before there was a choice have none.
            "head": Algorithm(values.get("head", Algorithm.NONE)),
        }
        return cls(**{**values, **kinds})

    @classmethod
    def from_flags(
        cls,
        *,
        use_weight_only: bool = False,
        weight_only_precision: str = "int8",
        use_smooth_quant: bool = False,
        per_token: bool = False,
        per_channel: bool = False,
        enable_fp8: bool = False,
        int8_kv_cache: bool = False,
        fp8_kv_cache: bool = False,
        group_size: int | None = None,
        quantize_lm_head: bool = False,
    ) -> QuantConfig:
        """The mode that build.py's flags ask for; UserError for contradicting flags.

        `--per_group` is understood from the precision and need not be given.
        """
        flags = {name: value for name, value in locals().items() if value is True}
        for first, second, why in CLASHES:
            if first in flags and second in flags:
                raise UserError(f"--{first} and --{second} cannot be combined: {why}")
        for name in ("per_token", "per_channel"):
            if name in flags and not use_smooth_quant:
                raise UserError(
                    f"--{name} belongs to --use_smooth_quant; add that flag or leave this one out"
                )
        if weight_only_precision != "int8" and not use_weight_only:
            raise UserError(
                f"--weight_only_precision {weight_only_precision} belongs to --use_weight_only; "
                "add that flag or leave this one out"
            )
        algorithm = Algorithm.NONE
        if use_weight_only:
            algorithm = _PRECISIONS[weight_only_precision]
        elif use_smooth_quant:
            algorithm = Algorithm.W8A8_SQ
        elif enable_fp8:
            algorithm = Algorithm.FP8
        kv = KVStorage.INT8 if int8_kv_cache else KVStorage.FP8 if fp8_kv_cache else KVStorage.NONE
        if group_size is not None and algorithm not in GROUPED:
            raise UserError(
                f"--group_size {group_size} belongs to --weight_only_precision int4_awq or "
                "int4_gptq; add that flag or leave this one out"
            )
        if group_size is not None and group_size % GROUP_MULTIPLE:
            raise UserError(
                f"--group_size {group_size} is no multiple of {GROUP_MULTIPLE}, as kernels take "
                "inputs; 128 is what most checkpoints have"
            )
        group_size = (group_size or DEFAULT_GROUP_SIZE) if algorithm in GROUPED else 0
        head = Algorithm.W8A16 if quantize_lm_head else Algorithm.NONE
        return cls(algorithm, group_size, per_token, per_channel, kv, head)

    def joined(self, found: QuantConfig | None, *, is_group_given: bool) -> QuantConfig:
        """What these flags mean for a checkpoint that is quantised as `found` (None: it is not).

        Flags that say nothing take over what the checkpoint is. Whether given ones fit its
        weights is seen when these are packed.
        """
        if found is None:
            return self
        kv = found.kv if self.kv is KVStorage.NONE else self.kv
        if self.algorithm is Algorithm.NONE:
            return replace(found, kv=kv, head=self.head)
        if self.algorithm is not found.algorithm:
            return replace(self, kv=kv)
        group_size = self.group_size if is_group_given else found.group_size
        if self.algorithm is Algorithm.FP8:
            return replace(found, kv=kv, head=self.head)
        return replace(self, kv=kv, group_size=group_size)
