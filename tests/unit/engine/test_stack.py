"""A decode step's layers in one call give the bits of one layer after the other."""

from __future__ import annotations

import pytest
import torch

from engine import env
from engine.backends import open_engine
from engine.comm import World
from engine.sampling import SamplingParams
from tests.cli.build_runner import run_here

pytestmark = pytest.mark.skipif(env.cxx_compiler() is None, reason="needs a C++ compiler")

SHAPE = ("--n_layer", "3", "--n_embd", "128", "--n_head", "4", "--n_kv_head", "2",
         "--inter_size", "192", "--vocab_size", "160", "--log_level", "error")  # fmt: skip
PROMPTS = [[5, 9, 3], [7], [11, 2, 8, 4, 6, 1, 3, 9, 30]]
INT4 = ("--use_weight_only", "--weight_only_precision", "int4_awq", "--group_size", "64")
SMOOTH = ("--use_smooth_quant", "--per_token", "--per_channel")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "flags",
    [INT4, ("--use_weight_only",), SMOOTH, (*INT4, "--paged_kv_cache", "--tokens_per_block", "4")],
    ids=["int4", "int8", "w8a8", "int4, paged"],
)
def test_all_layers_at_once(dtype, flags, tmp_path):
    output = tmp_path / "engine"
    assert run_here(*SHAPE, "--dtype", dtype, *flags, "--output_dir", output).status == 0
    calls = []

    def decode(count: bool) -> list:
        session = open_engine(output, World(), device="cpu")
        stack = session._network._stack
        at_once = stack._at_once
        assert at_once is not None

        def counted(*arguments):
            found = at_once(*arguments)
            calls.append(found is not None)
            return found

        stack.__dict__["_at_once"] = counted if count else None
        params = [SamplingParams(max_new_tokens=6, end_ids=())] * len(PROMPTS)
        results = session.generate(PROMPTS, params, generation_logits=True)
        return [(r.beams[0].tokens, r.generation_logits) for r in results]

    together, apart = decode(True), decode(False)
    # The prompts' step is not one of them.
    assert calls == [False] + [True] * 5
    for (tokens, logits), (other_tokens, other_logits) in zip(together, apart, strict=True):
        assert tokens == other_tokens
        assert torch.equal(logits, other_logits)


@pytest.mark.parametrize("flags", [(), ("--enable_fp8",), ("--use_weight_only", "--fp8_kv_cache")])
def test_what_else_there_is_goes_layer_by_layer(flags, tmp_path):
    output = tmp_path / "engine"
    assert run_here(*SHAPE, *flags, "--output_dir", output).status == 0
    session = open_engine(output, World(), device="cpu")
    stack = session._network._stack
    found = session.generate([[5, 9, 3]], [SamplingParams(max_new_tokens=3, end_ids=())])
    assert len(found[0].beams[0].tokens) == 3
    if "--use_weight_only" not in flags:
        assert stack._at_once is None
