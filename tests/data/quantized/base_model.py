"""The tiny seeded Llama that the quantised checkpoints beside this file were made from.

`python base_model.py` writes it to base/. Its activations have channels of very different size, so
that smoothing has something to do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
VOCAB, WIDTH = 32, 256


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5_000_000.0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.linspace(0.2, 4.0, WIDTH))
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def make_prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (1, 32), generator=generator) for _ in range(8)]


if __name__ == "__main__":
    make_model().save_pretrained(HERE / "base")
