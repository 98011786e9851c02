"""The architecture as data: one row per engine tensor (or per linear layer)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.weights.shard import Shard


class Stage(Enum):
    """Pipeline stages that hold a row."""

    FIRST = "first"
    EVERY_LAYER = "every layer"
    LAST = "last"


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor's stem ('.weight' is implied) and how tp cuts it."""

    stem: str
    shard: Shard = Shard.NONE


@dataclass(frozen=True)
class WeightSpec:
    """`target` in the engine file ({i} is the slot) made of `sources` ({i} is the layer).

    Several sources are cut one by one and then joined along their outputs. A `linear` row follows
    the engine's quantisation, the head a choice of its own, the others are stored in the engine's
    dtype.
    """

    target: str
    sources: tuple[Source, ...]
    stage: Stage = Stage.EVERY_LAYER
    linear: bool = False


_L = "model.layers.{i}."
HEAD = "head"

YI = (
    WeightSpec("embed", (Source("model.embed_tokens", Shard.EMBED),), Stage.FIRST),
    WeightSpec("blocks.{i}.attn_norm", (Source(_L + "input_layernorm"),)),
    WeightSpec(
        "blocks.{i}.attn.qkv",
        (
            Source(_L + "self_attn.q_proj", Shard.HEADS),
            Source(_L + "self_attn.k_proj", Shard.KV_HEADS),
            Source(_L + "self_attn.v_proj", Shard.KV_HEADS),
        ),
        linear=True,
    ),
    WeightSpec(
        "blocks.{i}.attn.out", (Source(_L + "self_attn.o_proj", Shard.HEADS_IN),), linear=True
    ),
    WeightSpec("blocks.{i}.mlp_norm", (Source(_L + "post_attention_layernorm"),)),
    WeightSpec(
        "blocks.{i}.mlp.gate_up",
        (Source(_L + "mlp.gate_proj", Shard.FFN), Source(_L + "mlp.up_proj", Shard.FFN)),
        linear=True,
    ),
    WeightSpec("blocks.{i}.mlp.down", (Source(_L + "mlp.down_proj", Shard.FFN_IN),), linear=True),
    WeightSpec("norm", (Source("model.norm"),), Stage.LAST),
    WeightSpec(HEAD, (Source("lm_head", Shard.VOCAB),), Stage.LAST),
)
