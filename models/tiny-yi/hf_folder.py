"""The files of tiny-yi that are neither text nor training: settings and weights.

config.json keeps the spelling of Yi's own file (``rope_theta`` at the top, ``torch_dtype``), which
current transformers reads but no longer writes; so the file is written here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BOS, EOS, PAD, IM_START, IM_END = 1, 2, 0, 6, 7
SPECIAL = ["<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>"]  # ids 3..7
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 4096,
}


NAMES = {0: "<unk>", BOS: "<|startoftext|>", EOS: "<|endoftext|>"}


def write_settings(folder: Path) -> None:
    """Write config, generation config and tokenizer settings; tokenizer.model is not written."""
    _write(folder / "config.json", ARCHITECTURE)
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": BOS,
            "eos_token_id": [EOS, IM_END],
            "pad_token_id": PAD,
            "do_sample": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    named = {
        "bos_token": NAMES[BOS],
        "eos_token": NAMES[EOS],
        "pad_token": NAMES[PAD],
        "unk_token": NAMES[0],
    }
    _write(folder / "special_tokens_map.json", named)
    added = NAMES | dict(enumerate(SPECIAL, 3))
    _write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": {str(i): _added(piece) for i, piece in added.items()},
            **named,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": ARCHITECTURE["max_position_embeddings"],
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )


def write_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors in bfloat16, whole or not at all."""
    unfinished = folder / "model.safetensors.tmp-0"
    save_file(
        {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()},
        unfinished,
        metadata={"format": "pt"},
    )
    unfinished.replace(folder / "model.safetensors")


def _added(piece: str) -> dict:
    return {
        "content": piece,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
