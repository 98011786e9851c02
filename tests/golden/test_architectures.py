"""Shapes and RoPE scalings of Llama-like checkpoints: random models made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.golden import truth
from tests.golden.asking import ask, ask_ranks, assert_close, question
from tests.golden.truth import Answer

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 24
VOCAB = 211  # odd, and no multiple of any number of ranks
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    # Large enough for logits that differ.
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Short of the 64 positions the models were made for, across them while generating, and beyond.
LENGTHS = (3, 17, 50, 100)

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with its own gain": YARN | {"attention_factor": 1.3, "beta_fast": 16.0},
    "another base": {"rope_type": "default", "rope_theta": 500.0},
}
SHAPES = {
    "heads 7:1 of 128": {
        "hidden_size": 112,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 128,
    },
    "heads 8:1 of 128": {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "initializer_range": 0.04,
    },
    "heads 4:4": {"num_key_value_heads": 4},
    "heads narrower than the model": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
    "large eps": {"rms_norm_eps": 0.1},
}


class Model(NamedTuple):
    folder: Path
    prompts: list[list[int]]
    answers: list[Answer]
    scores: list[torch.Tensor]


def make_model(folder: Path, **changes: Any) -> Model:
    """A random model saved in `folder`, and what it answers: the first whose answers are clear."""
    config = LlamaConfig(**(SHAPE | {"rope_theta": 10000.0} | changes))
    config._attn_implementation = "eager"
    for seed in range(10):
        model, prompts = _draw_model(config, seed)
        answers = [
            truth.continue_greedily(_unused(model), prompt, NEW_TOKENS) for prompt in prompts
        ]
        if min(answer.margin for answer in answers) > truth.LEAST_MARGIN:
            model.save_pretrained(folder)
            scores = [truth.score(_unused(model), prompt) for prompt in prompts]
            return Model(folder, prompts, answers, scores)
    raise AssertionError("no model answers clearly")


def _draw_model(config: LlamaConfig, seed: int) -> tuple[LlamaForCausalLM, list[list[int]]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        return model, [torch.randint(VOCAB, (length,)).tolist() for length in LENGTHS]


def _unused(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model remembers the longest text it has seen, and dynamic scaling goes by that."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def check(model: Model, asking) -> None:
    """`asking` takes questions by name and gives their answers."""
    found = asking(
        {
            "greedy": question(model.prompts, max_new_tokens=NEW_TOKENS, end_ids=()),
            "scores": question(model.prompts, score=True),
        }
    )
    assert found["greedy"].best == [answer.tokens for answer in model.answers]
    assert_close(found["greedy"].logits, [answer.logits_NV for answer in model.answers])
    assert_close(found["scores"].logits, model.scores)


@pytest.mark.parametrize("flags", ["", "--max_num_tokens 9 --paged_kv_cache --tokens_per_block 8"])
@pytest.mark.parametrize("name", ROPES)
def test_rope(name, flags, open_built, device, tmp_path):
    rope = {"rope_theta": 10000.0} | ROPES[name]
    model = make_model(tmp_path / "model", rope_parameters=rope)
    session = open_built(model.folder, *flags.split(), device=device)
    check(model, lambda asked: {key: ask(session, one) for key, one in asked.items()})


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name, open_built, device, tmp_path):
    model = make_model(tmp_path / "model", **SHAPES[name])
    session = open_built(model.folder, device=device)
    check(model, lambda asked: {key: ask(session, one) for key, one in asked.items()})


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "flags", "changes"),
    [
        (4, "--tp_size 4", {}),
        (
            4,
            "--tp_size 4 --use_parallel_embedding --embedding_sharding_dim 0",
            {"tie_word_embeddings": True},
        ),
        (
            2,
            "--pp_size 2",
            {
                "rope_parameters": ROPES["dynamic"] | {"rope_theta": 1e4},
                "tie_word_embeddings": True,
            },
        ),
    ],
    ids=["odd vocabulary", "odd tied vocabulary, cut table", "tied dynamic stages"],
)
def test_ranks(ranks, flags, changes, build, device, tmp_path):
    model = make_model(tmp_path / "model", **changes)
    engine = build(model.folder, *flags.split())
    check(model, lambda asked: ask_ranks(ranks, engine, asked, tmp_path, device))
