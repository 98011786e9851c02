"""ModelConfig: every number that changes a logit, built at one door per source.

Knows nothing of tensors, parallelism or quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from engine.errors import CheckpointError, UserError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

# Feature keys of Llama-like config files and the value at which the feature is off.
UNSUPPORTED_FEATURES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "qkv_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None, 0),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None, 0.0),
    "final_logit_softcapping": (None, 0.0),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
}

ARCHITECTURES = ("LlamaForCausalLM", "YiForCausalLM", "LLaMAForCausalLM")
MODEL_TYPES = ("llama", "Yi", "yi")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta` and its scaling, with the names of transformers' config.

    `factor` and the fields after it have a meaning only for the scaling types that use them:
    linear and dynamic (NTK): factor; llama3: low/high_freq_factor, original_max_positions;
    yarn (arXiv 2309.00071): beta_*, attention_factor, mscale*, truncate, original_max_positions.
    """

    theta: float = 5_000_000.0
    type: str = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a Llama-architecture network; the defaults are Yi-6B's."""

    vocab_size: int = 64000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 11008
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} KV "
                "heads (num_attention_heads, num_key_value_heads); correct the configuration"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embeddings need an even one")
        if self.hidden_act not in ("silu", "swish"):
            raise UserError(
                f"hidden_act {self.hidden_act!r} is not supported: the network has SwiGLU (silu)"
            )

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, a tied head counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * block + tables + self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; KeyError/TypeError on foreign keys (the schema version guards)."""
        return cls(**{**values, "rope": Rope(**values["rope"])})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> ModelConfig:
        """From a Hugging Face config.json, old spelling or that of transformers 5.

        Raises CheckpointError, naming `where`, for a missing or senseless field and for every
        feature that the network does not have.
        """
        _refuse_foreign(config, where)
        heads = _positive_int(config, "num_attention_heads", where)
        hidden = _positive_int(config, "hidden_size", where)
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
                "and head_dim is not given; correct the file"
            )
        max_positions = _positive_int(config, "max_position_embeddings", where)
        try:
            return cls(
                vocab_size=_positive_int(config, "vocab_size", where),
                hidden_size=hidden,
                num_layers=_positive_int(config, "num_hidden_layers", where),
                num_heads=heads,
                num_kv_heads=_positive_int(config, "num_key_value_heads", where, default=heads),
                head_dim=_positive_int(config, "head_dim", where, default=hidden // heads),
                intermediate_size=_positive_int(config, "intermediate_size", where),
                max_positions=max_positions,
                rms_norm_eps=_positive_float(config, "rms_norm_eps", where),
                hidden_act=str(config.get("hidden_act", "silu")),
                tie_word_embeddings=_boolean(config, "tie_word_embeddings", where),
                rope=_rope_from_hf(config, where, max_positions),
            )
        except CheckpointError:
            raise
        except UserError as error:
            raise CheckpointError(f"{where}: {error}") from None

    @classmethod
    def from_meta(
        cls, params: Mapping[str, Any], where: str, *, vocab_size: int, intermediate_size: int
    ) -> ModelConfig:
        """From Meta's params.json; the two sizes it leaves out come from the tensors' shapes."""
        heads = _positive_int(params, "n_heads", where)
        hidden = _positive_int(params, "dim", where)
        scaled = bool(params.get("use_scaled_rope", False))
        rope = Rope(theta=_positive_float(params, "rope_theta", where, default=10000.0))
        if scaled:
            # The constants of Llama 3.1's release, which params.json does not repeat.
            rope = Rope(theta=rope.theta, type="llama3", factor=8.0, original_max_positions=8192)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=_positive_int(params, "n_layers", where),
            num_heads=heads,
            num_kv_heads=_positive_int(params, "n_kv_heads", where, default=heads),
            head_dim=hidden // heads,
            intermediate_size=intermediate_size,
            max_positions=_positive_int(params, "max_seq_len", where, default=4096),
            rms_norm_eps=_positive_float(params, "norm_eps", where),
            rope=rope,
        )


def from_flags(
    *,
    vocab_size: int | None = None,
    n_layer: int | None = None,
    n_positions: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    inter_size: int | None = None,
    multiple_of: int = 256,
    ffn_dim_multiplier: float = 1.0,
    hidden_act: str | None = None,
    rms_norm_eps: float | None = None,
    rope: Rope | None = None,
) -> ModelConfig:
    """From build.py's shape flags (dummy builds); what is not given is Yi-6B's.

    A width without `inter_size` follows Meta's rule: two thirds of 4·n_embd times
    `ffn_dim_multiplier`, rounded up to `multiple_of`.
    """
    base = ModelConfig()
    hidden = n_embd or base.hidden_size
    heads = n_head or base.num_heads
    if hidden % heads:
        raise UserError(f"--n_head {heads} does not divide --n_embd {hidden}; choose a divisor")
    if inter_size is None:
        width = int(ffn_dim_multiplier * int(8 * hidden / 3))
        inter_size = -(-width // multiple_of) * multiple_of
    if n_kv_head is None:
        n_kv_head = base.num_kv_heads if n_head is None else heads
    return ModelConfig(
        vocab_size=vocab_size or base.vocab_size,
        hidden_size=hidden,
        num_layers=n_layer or base.num_layers,
        num_heads=heads,
        num_kv_heads=n_kv_head,
        head_dim=hidden // heads,
        intermediate_size=inter_size,
        max_positions=n_positions or base.max_positions,
        rms_norm_eps=rms_norm_eps or base.rms_norm_eps,
        hidden_act=hidden_act or base.hidden_act,
        rope=rope or base.rope,
    )


def _refuse_foreign(config: Mapping[str, Any], where: str) -> None:
    architectures = config.get("architectures") or [None]
    model_type = config.get("model_type")
    named = architectures[0] if isinstance(architectures, list) else architectures
    if named is not None and named not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: architecture {named!r} is not supported; use a LlamaForCausalLM checkpoint "
            "such as Yi's"
        )
    if named is None and model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; use a checkpoint of model_type "
            "'llama'"
        )
    for feature, neutral in UNSUPPORTED_FEATURES.items():
        if feature in config and config[feature] not in neutral:
            raise CheckpointError(
                f"{where}: {feature} {config[feature]!r} is a feature this network does not have; "
                "only checkpoints without it can be built"
            )
    kinds = set(config.get("layer_types") or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise CheckpointError(
            f"{where}: layer_types contains {sorted(kinds)}, which this network does not have; "
            "only full_attention layers can be built"
        )


def _rope_from_hf(config: Mapping[str, Any], where: str, max_positions: int) -> Rope:
    given = _rope_parameters(config, where)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{where}: rope type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}"
        )
    if given.get("partial_rotary_factor") not in (None, 1.0):
        raise CheckpointError(
            f"{where}: partial_rotary_factor {given['partial_rotary_factor']} is a feature this "
            "network does not have; only fully rotated heads can be built"
        )
    theta = _positive_float({**config, **given}, "rope_theta", where, default=10000.0)
    if kind == "default":
        return Rope(theta=theta)
    factor = given.get("factor")
    if not _is_number(factor) or factor < 1:
        raise CheckpointError(
            f"{where}: rope scaling {kind!r} needs a factor of at least 1, found {factor!r}"
        )
    # As in transformers, a length beside the scaling's dictionary wins over the one in it.
    length = "original_max_position_embeddings"
    original = _positive_int(
        {length: config.get(length) or given.get(length)}, length, where, default=max_positions
    )
    names = {f.name for f in fields(Rope)} - {"theta", "type", "factor", "original_max_positions"}
    extra = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in extra.items():
        if not (isinstance(value, bool) if name == "truncate" else _is_number(value)):
            raise CheckpointError(f"{where}: rope scaling's {name} {value!r} has the wrong type")
    return Rope(theta, kind, factor=float(factor), original_max_positions=original, **extra)


def _rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The scaling's own dictionary, whichever of its two names it has."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        values = config.get(key) or {}
        if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
            raise CheckpointError(
                f"{where}: {key} {values!r} is not one set of values for all layers; only such "
                "rotary embeddings can be built"
            )
        given |= values
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _boolean(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} {value!r} must be true or false")
    return bool(value)


def _positive_int(
    config: Mapping[str, Any], key: str, where: str, default: int | None = None
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where}: field {key!r} is missing; a complete config is needed")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{where}: {key} {value!r} must be a positive whole number")
    return value


def _positive_float(
    config: Mapping[str, Any], key: str, where: str, default: float | None = None
) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where}: field {key!r} is missing; a complete config is needed")
    if not _is_number(value) or value <= 0:
        raise CheckpointError(f"{where}: {key} {value!r} must be a positive number")
    return float(value)
