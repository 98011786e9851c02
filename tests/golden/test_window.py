"""A limited attention window is the sliding window of transformers' Mistral with tiny-yi's weights.

One window for both: a position sees itself and the W - 1 before it.
"""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from tests.golden import truth
from tests.golden.asking import ask, assert_close, question
from tests.golden.truth import TINY_YI

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 24
CACHES = {
    "contiguous": "--max_batch_size 8",
    "paged 4": "--max_batch_size 8 --paged_kv_cache --tokens_per_block 4",
    "paged 16, in chunks": (
        "--max_batch_size 3 --max_num_tokens 25 --paged_kv_cache --tokens_per_block 16"
    ),
}


@pytest.fixture(scope="module", params=[2, 10, 64])
def windowed(request):
    window = request.param
    settings = json.loads((TINY_YI / "config.json").read_text())
    dropped = {"architectures", "model_type", "rope_scaling", "torch_dtype"}
    settings = {key: value for key, value in settings.items() if key not in dropped}
    model = MistralForCausalLM._from_config(
        MistralConfig(**settings, sliding_window=window), attn_implementation="eager"
    ).eval()
    model.load_state_dict(load_file(TINY_YI / "model.safetensors"))
    prompts = truth.cut_prompts((1, 9, 65, 10, 120), start=11000)
    answers = [truth.continue_greedily(model, p, NEW_TOKENS) for p in prompts]
    assert min(answer.margin for answer in answers) > truth.LEAST_MARGIN
    return window, prompts, answers, [truth.score(model, p) for p in prompts]


@pytest.mark.parametrize("flags", CACHES.values(), ids=CACHES)
def test_window(flags, windowed, open_built, device):
    window, prompts, answers, scores = windowed
    session = open_built(TINY_YI, *flags.split(), device=device, max_attention_window=window)
    found = ask(session, question(prompts, max_new_tokens=NEW_TOKENS, end_ids=()))
    assert found.best == [answer.tokens for answer in answers]
    assert_close(found.logits, [answer.logits_NV for answer in answers])
    assert_close(ask(session, question(prompts, score=True)).logits, scores)


def test_window_of_everything_changes_nothing(tiny, open_built, device):
    session = open_built(TINY_YI, "--max_batch_size", "8", device=device, max_attention_window=512)
    prompts = tiny.prompts[:3]
    found = ask(session, question(prompts, max_new_tokens=8, end_ids=truth.END_IDS))
    assert found.best == [tokens[:8] for tokens in tiny.tokens[:3]]
