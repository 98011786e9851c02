"""transformers' side decodes what its own generate() does, with either cache."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from benchmarks.peering.hf import Transformers
from benchmarks.peering.task import Task
from utils.benchmarking.dummy import DummyEngine
from utils.benchmarking.workload import Workload


@pytest.fixture(scope="module")
def side() -> Transformers:
    before = torch.get_num_threads()
    dummy = DummyEngine("tiny", layers=1, dtype="float32")
    side = Transformers(Task(dummy, Workload(2, 12, 6), "cpu", "", ""))
    torch.set_num_threads(before)
    return side


def generate(side: Transformers, new_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return side._generate(new_tokens)


def expected(side: Transformers, new_tokens: int) -> torch.Tensor:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = side._prompts_BT
    return side._model.generate(prompts, max_new_tokens=new_tokens, **settings)[:, 12:]


def test_a_growing_cache(side):
    assert torch.equal(generate(side, 6), expected(side, 6))


def test_a_static_cache_is_used_again(side, monkeypatch):
    cache = StaticCache(config=side._model.config, max_cache_len=18)
    monkeypatch.setattr(side, "_static", cache)
    for new_tokens in (6, 1, 6):
        assert torch.equal(generate(side, new_tokens), expected(side, new_tokens))


def test_a_compiled_step_reads_the_cache_that_it_was_given(side, monkeypatch):
    """The tracing that CUDA graphs start from, without generating code."""
    monkeypatch.setattr(side, "_static", StaticCache(config=side._model.config, max_cache_len=18))
    compiled = torch.compile(side._forward, backend="eager", fullgraph=True)
    monkeypatch.setattr(side, "_step", compiled)
    for _ in range(2):
        assert torch.equal(generate(side, 6), expected(side, 6))


def test_the_network_has_the_shape(side):
    config = DummyEngine("tiny", layers=1).config
    assert sum(weight.numel() for weight in side._model.parameters()) == config.num_parameters
