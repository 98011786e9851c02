"""--quantize_lm_head: logits are those of transformers with the head's codes times their scales."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.backends import open_engine
from engine.comm import World
from engine.sampling import SamplingParams
from tests.golden import truth
from tests.golden.asking import ask, ask_ranks, assert_close, question, relative_error
from tests.golden.quant_truth import QuantisedTruth
from tests.golden.test_architectures import SHAPE
from tests.golden.truth import TINY_YI, cut_prompts, load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FLAG = "--quantize_lm_head"
# What rounds at run time may round one value to the other of two codes.
EXACT, LOOSE = 1e-3, 0.15
MODES = (
    "FP32",
    "INT8 weight-only",
    "INT4 weight-only",
    "INT4 AWQ, groups of 128",
    "INT4 GPTQ, groups of 128",
    "SmoothQuant per channel",
    "FP8, scales at run time",
)
PROMPTS = cut_prompts([1, 2, 3, 4, 5, 6, 40])


def round_rows(w_VE: Tensor) -> Tensor:
    """What INT8 with a scale per row keeps of a matrix."""
    scale_V1 = w_VE.abs().amax(1, keepdim=True) / 127
    return torch.round(w_VE / scale_V1) * scale_V1


@pytest.mark.parametrize("name", MODES)
def test_every_mode(name, workshop, device):
    engine = workshop.build(name, "--dtype", "float32", FLAG)
    model = QuantisedTruth(engine)
    head_VE = load_model(TINY_YI).lm_head.weight
    torch.testing.assert_close(model.model.lm_head.weight, round_rows(head_VE))
    found = open_engine(engine, World(), device=device).score(PROMPTS)
    expected = [model.score(prompt) for prompt in PROMPTS]
    errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    assert median(errors) < EXACT
    assert max(errors) < LOOSE


def test_tokens_one_by_one(workshop, device):
    """A token that is decoded gets the logits that it gets within a prompt."""
    engine = workshop.build("INT4 weight-only", "--dtype", "float32", FLAG)
    session = open_engine(engine, World(), device=device)
    params = [SamplingParams(max_new_tokens=6, end_ids=())] * len(PROMPTS)
    results = session.generate(PROMPTS, params, generation_logits=True)
    pairs = list(zip(PROMPTS, results, strict=True))
    whole = session.score([[*prompt, *result.beams[0].tokens[:-1]] for prompt, result in pairs])
    for (prompt, result), logits_SV in zip(pairs, whole, strict=True):
        assert relative_error(result.generation_logits, logits_SV[len(prompt) - 1 :]) < EXACT


class Tied(NamedTuple):
    folder: Path
    prompts: list[list[int]]
    scores: list[Tensor]


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Tied:
    """A model whose head is its embedding table, of an odd vocabulary; the scores are those of the
    whole table with a rounded copy for a head."""
    folder = tmp_path_factory.mktemp("tied")
    config = LlamaConfig(**SHAPE | {"rope_theta": 10000.0, "tie_word_embeddings": True})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in (3, 17)]
    model.save_pretrained(folder)
    head_VE = round_rows(model.model.embed_tokens.weight.detach())
    model.lm_head.weight = nn.Parameter(head_VE, requires_grad=False)
    return Tied(folder, prompts, [truth.score(model, prompt) for prompt in prompts])


@pytest.mark.parametrize("flags", [(), ("--use_parallel_embedding",)])
def test_a_tied_head_is_a_rounded_copy(flags, tied, open_built, device):
    session = open_built(tied.folder, FLAG, *flags, device=device)
    assert_close(ask(session, question(tied.prompts, score=True)).logits, tied.scores)


@pytest.mark.mpi
def test_ranks_share_the_vocabulary(tied, build, device, tmp_path):
    engine = build(tied.folder, FLAG, "--tp_size", "2")
    asked = {"scores": question(tied.prompts, score=True)}
    found = ask_ranks(2, engine, asked, tmp_path, device)
    assert_close(found["scores"].logits, tied.scores)
