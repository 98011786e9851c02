"""ModelConfig against transformers' LlamaConfig and models, on the configs that were published."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import ModelConfig, Rope, from_flags
from engine.errors import CheckpointError, UserError

YI = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 64000,
}
YI_34B = YI | {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
}
YI_CODER = YI | {"max_position_embeddings": 131072, "rope_theta": 10000000.0}
LLAMA = YI | {
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "num_key_value_heads": 32,
    "mlp_bias": False,
}
LLAMA_3 = LLAMA | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "pad_token_id": None,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_32_1B = LLAMA_3 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Yi-6B": YI,
    "Yi-6B-200K": YI | {"max_position_embeddings": 200000},
    "Yi-9B": YI | {"num_hidden_layers": 48, "rope_theta": 10000},
    "Yi-34B": YI_34B,
    "Yi-34B-Chat": YI_34B | {"eos_token_id": 7},
    "Yi-34B-200K": YI_34B | {"max_position_embeddings": 200000, "rope_theta": 10000000.0},
    "Yi-1.5-6B": YI | {"rms_norm_eps": 1e-06},
    "Yi-1.5-9B": YI | {"num_hidden_layers": 48, "rms_norm_eps": 1e-06},
    "Yi-1.5-34B": YI_34B | {"rms_norm_eps": 1e-06},
    "Yi-Coder-1.5B": YI_CODER
    | {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
    },
    "Yi-Coder-9B": YI_CODER | {"num_hidden_layers": 48},
    "Yi-6B of November 2023": YI | {"architectures": ["YiForCausalLM"], "model_type": "Yi"},
    # The first Llama 2 files leave rope_theta and num_key_value_heads out.
    "Llama-2-7B": {
        k: v for k, v in LLAMA.items() if k not in ("rope_theta", "num_key_value_heads")
    },
    "Llama-3-8B": LLAMA_3,
    "Llama-3.1-8B": LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": LLAMA_31_ROPE},
    "Llama-3.2-1B": LLAMA_32_1B,
}
# Sums of the tensors of the published weight files.
PARAMETERS = {
    "Yi-6B": 6_061_035_520,
    "Yi-9B": 8_829_407_232,
    "Yi-34B": 34_388_917_248,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
}
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
    "tie_word_embeddings": "tie_word_embeddings",
}


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    return config


def new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 saves it."""
    rest = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config["rope_scaling"] or {}
    rest["dtype"] = rest.pop("torch_dtype")
    return rest | {"rope_parameters": rope, "transformers_version": "5.0.0"}


@pytest.mark.parametrize("spell", [old_spelling, new_spelling])
@pytest.mark.parametrize("name", PUBLISHED)
def test_from_hf_agrees_with_transformers(name, spell):
    config = copy.deepcopy(spell(PUBLISHED[name]))
    ours = ModelConfig.from_hf(config, "config.json")
    theirs = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})

    assert {ours_: getattr(ours, ours_) for ours_ in FIELDS} == {
        ours_: getattr(theirs, theirs_) for ours_, theirs_ in FIELDS.items()
    }
    rope = theirs.rope_parameters
    assert (ours.rope.theta, ours.rope.type) == (rope["rope_theta"], rope["rope_type"])
    if ours.rope.type == "llama3":
        assert ours.rope == Rope(
            theta=500000.0,
            type="llama3",
            factor=rope["factor"],
            original_max_positions=rope["original_max_position_embeddings"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_num_parameters_counts_transformers_model(name):
    config = copy.deepcopy(PUBLISHED[name])
    del config["model_type"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    ours = ModelConfig.from_hf(PUBLISHED[name], "config.json").num_parameters
    assert ours == sum(parameter.numel() for parameter in model.parameters())
    assert ours == PARAMETERS.get(name, ours)


def test_yi_6b_is_the_default():
    assert ModelConfig.from_hf(YI, "config.json") == ModelConfig()


@pytest.mark.parametrize("name", PUBLISHED)
def test_dict_round_trip(name):
    config = ModelConfig.from_hf(PUBLISHED[name], "config.json")
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_head_dim_of_the_file_wins():
    config = ModelConfig.from_hf(YI | {"head_dim": 96, "hidden_size": 100}, "config.json")
    assert (config.head_dim, config.hidden_size) == (96, 100)


def test_length_beside_the_scaling_wins_as_in_transformers():
    given = {"original_max_position_embeddings": 1024, "rope_scaling": LLAMA_31_ROPE}
    theirs = LlamaRotaryEmbedding(LlamaConfig(rope_theta=1e4, **copy.deepcopy(given))).config
    assert theirs.rope_parameters["original_max_position_embeddings"] == 1024
    assert ModelConfig.from_hf(YI | given, "config.json").rope.original_max_positions == 1024


def test_yarn_fields_are_read():
    scaling = {
        "type": "yarn",
        "factor": 4,
        "beta_fast": 16,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.8,
        "truncate": False,
    }
    config = ModelConfig.from_hf(YI | {"rope_scaling": scaling}, "config.json")
    assert config.rope == Rope(
        theta=5e6,
        type="yarn",
        factor=4.0,
        original_max_positions=4096,
        beta_fast=16,
        beta_slow=2.0,
        attention_factor=1.5,
        mscale=0.7,
        mscale_all_dim=0.8,
        truncate=False,
    )


REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_field_is_named(key):
    config = {k: v for k, v in YI.items() if k != key}
    with pytest.raises(CheckpointError, match=rf"^here/config.json: field '{key}' is missing"):
        ModelConfig.from_hf(config, "here/config.json")


WHOLE_NUMBERS = (*REQUIRED[:-1], "num_key_value_heads", "head_dim")


@pytest.mark.parametrize("value", ["4096", 4096.0, True, 0, -1, [32]], ids=repr)
@pytest.mark.parametrize("key", WHOLE_NUMBERS)
def test_whole_numbers_are_checked(key, value):
    with pytest.raises(CheckpointError, match=rf"^c.json: {key} .* positive whole number"):
        ModelConfig.from_hf(YI | {key: value}, "c.json")


@pytest.mark.parametrize("value", ["1e-5", False, 0, -1e-5, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_numbers_are_checked(key, value):
    with pytest.raises(CheckpointError, match=rf"^c.json: {key} .* positive number"):
        ModelConfig.from_hf(YI | {key: value}, "c.json")


REFUSED = [
    ({"architectures": ["MixtralForCausalLM"]}, "architecture 'MixtralForCausalLM' is not supp"),
    ({"architectures": ["Qwen2ForCausalLM"]}, "architecture 'Qwen2ForCausalLM' is not supported"),
    ({"architectures": "LlamaModel"}, "architecture 'LlamaModel' is not supported"),
    ({"architectures": None, "model_type": "mistral"}, "model_type 'mistral' is not supported"),
    ({"architectures": [], "model_type": None}, "model_type None is not supported"),
    ({"attention_bias": True}, "attention_bias True is a feature"),
    ({"qkv_bias": True}, "qkv_bias True is a feature"),
    ({"mlp_bias": True}, "mlp_bias True is a feature"),
    ({"sliding_window": 4096}, "sliding_window 4096 is a feature"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types contains"),
    ({"num_local_experts": 8}, "num_local_experts 8 is a feature"),
    ({"num_experts": 64}, "num_experts 64 is a feature"),
    ({"n_routed_experts": 160}, "n_routed_experts 160 is a feature"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is a feature"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is a feature"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is a feature"),
    ({"logit_scale": 0.0625}, "logit_scale 0.0625 is a feature"),
    ({"logits_scaling": 8.0}, "logits_scaling 8.0 is a feature"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0 is a feature"),
    ({"residual_multiplier": 0.22}, "residual_multiplier 0.22 is a feature"),
    ({"attention_multiplier": 0.0078}, "attention_multiplier 0.0078 is a feature"),
    ({"use_qk_norm": True}, "use_qk_norm True is a feature"),
    ({"qk_layernorm": True}, "qk_layernorm True is a feature"),
    ({"clip_qkv": 8.0}, "clip_qkv 8.0 is a feature"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' must be true or false"),
    ({"num_key_value_heads": 5}, "32 attention heads are not a multiple of 5 KV heads"),
    ({"head_dim": 63}, "head_dim 63 is odd"),
    ({"hidden_size": 4100}, "hidden_size 4100 is not a multiple of num_attention_heads 32"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_refusals(changes, message):
    with pytest.raises(CheckpointError, match=rf"^c.json: {message}"):
        ModelConfig.from_hf(YI | changes, "c.json")


LINEAR = {"type": "linear", "factor": 2.0}
REFUSED_ROPES = [
    (
        {"type": "longrope", "factor": 4.0, "short_factor": [1.0]},
        "rope type 'longrope' is not supp",
    ),
    ({"type": "linear"}, "rope scaling 'linear' needs a factor of at least 1, found None"),
    (LINEAR | {"factor": 0.5}, "rope scaling 'linear' needs a factor .* found 0.5"),
    (LINEAR | {"factor": "2"}, "rope scaling 'linear' needs a factor .* found '2'"),
    (LINEAR | {"factor": float("nan")}, "rope scaling 'linear' needs a factor .* found nan"),
    (LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is a feature"),
    (LLAMA_31_ROPE | {"low_freq_factor": "1"}, "rope scaling's low_freq_factor '1' has the wrong"),
    (LINEAR | {"type": "yarn", "truncate": 1}, "rope scaling's truncate 1 has the wrong type"),
    (
        LLAMA_31_ROPE | {"original_max_position_embeddings": "8192"},
        "original_max_position_embeddings '8192' must be a positive whole number",
    ),
    (["linear", 2.0], "rope_scaling .* is not one set of values"),
    ({"full_attention": LINEAR}, "rope_scaling .* is not one set of values"),
]


@pytest.mark.parametrize("scaling, message", REFUSED_ROPES, ids=[m[:40] for _, m in REFUSED_ROPES])
def test_rope_refusals(scaling, message):
    with pytest.raises(CheckpointError, match=rf"^c.json: {message}"):
        ModelConfig.from_hf(YI | {"rope_scaling": scaling}, "c.json")


NEUTRAL = {
    "attention_bias": None,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 32,
    "num_local_experts": 1,
    "partial_rotary_factor": 1.0,
    "hidden_act": "swish",
    "tie_word_embeddings": None,
    "rope_parameters": None,
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_features_that_are_off_are_accepted(key):
    config = ModelConfig.from_hf(YI | {key: NEUTRAL[key]}, "c.json")
    assert dataclasses.replace(config, hidden_act="silu") == ModelConfig()


# Llama-2-7B's and Llama-3.1-8B's params.json; sizes and RoPE by hand from the releases.
META = {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}
META_31 = META | {"n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True}


def test_from_meta():
    config = ModelConfig.from_meta(
        META | {"vocab_size": -1}, "params.json", vocab_size=32000, intermediate_size=11008
    )
    assert config == ModelConfig.from_hf(PUBLISHED["Llama-2-7B"], "config.json")


def test_from_meta_with_scaled_rope():
    config = ModelConfig.from_meta(
        META_31, "params.json", vocab_size=128256, intermediate_size=14336
    )
    published = ModelConfig.from_hf(PUBLISHED["Llama-3.1-8B"], "config.json")
    # params.json does not say how long a context the model was trained for.
    assert config == dataclasses.replace(published, max_positions=4096)


@pytest.mark.parametrize("key", META)
def test_from_meta_names_missing_fields(key):
    params = {k: v for k, v in META.items() if k != key}
    with pytest.raises(CheckpointError, match=f"^params.json: field '{key}' is missing"):
        ModelConfig.from_meta(params, "params.json", vocab_size=1, intermediate_size=1)


def test_flags_left_out_mean_yi_6b():
    assert from_flags() == ModelConfig()


# 2/3 of 4·n_embd, truncated, times the multiplier, truncated, up to the next multiple.
WIDTHS = [
    ({"n_embd": 4096}, 11008),  # 10922 -> 43 · 256, Llama-2-7B
    ({"n_embd": 5120}, 13824),  # 13653 -> 54 · 256, Llama-2-13B
    ({"n_embd": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # Llama-2-70B
    ({"n_embd": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama-3-8B
    ({"n_embd": 4096, "multiple_of": 1024}, 11264),  # 10922 -> 11 · 1024
    ({"n_embd": 192, "multiple_of": 1}, 512),
    ({"n_embd": 64, "inter_size": 100}, 100),
]


@pytest.mark.parametrize("flags, width", WIDTHS)
def test_metas_width_rule(flags, width):
    assert from_flags(**flags).intermediate_size == width


def test_shape_flags():
    config = from_flags(
        vocab_size=97,
        n_layer=2,
        n_positions=128,
        n_embd=64,
        n_head=4,
        inter_size=96,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e4),
    )
    assert config == ModelConfig(
        vocab_size=97,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        intermediate_size=96,
        max_positions=128,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e4),
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"n_embd": 100, "n_head": 8}, "^--n_head 8 does not divide --n_embd 100"),
        ({"n_head": 8, "n_kv_head": 3}, "^8 attention heads are not a multiple of 3 KV heads"),
        ({"n_embd": 24, "n_head": 8}, "^head_dim 3 is odd"),
        ({"hidden_act": "gelu"}, "^hidden_act 'gelu' is not supported"),
    ],
)
def test_flag_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        from_flags(**flags)
