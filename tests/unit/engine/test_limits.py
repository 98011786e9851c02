"""BuildLimits: derived sizes, refusals, round trip."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from engine.limits import BuildLimits


def test_sequence_is_input_and_output():
    assert BuildLimits(max_input_len=1000, max_output_len=24).max_seq_len == 1024


@pytest.mark.parametrize("paged, tokens", [(False, 1024), (True, 128)])
def test_block_is_a_sequence_unless_paged(paged, tokens):
    limits = BuildLimits(
        max_input_len=1000, max_output_len=24, paged_kv_cache=paged, tokens_per_block=128
    )
    assert limits.block_tokens == tokens


@pytest.mark.parametrize(
    "name", ["max_batch_size", "max_input_len", "max_output_len", "max_beam_width"]
)
def test_sizes_must_be_positive(name):
    with pytest.raises(UserError, match=f"^--{name} 0 must be at least 1$"):
        BuildLimits(**{name: 0})


def test_max_num_tokens_must_be_positive():
    assert BuildLimits(max_num_tokens=None).max_num_tokens is None
    with pytest.raises(UserError, match="^--max_num_tokens 0 must be at least 1$"):
        BuildLimits(max_num_tokens=0)


@pytest.mark.parametrize("tokens", [0, -64, 3, 48, 65])
def test_blocks_are_powers_of_two(tokens):
    with pytest.raises(UserError, match=f"^--tokens_per_block {tokens} must be a power of two"):
        BuildLimits(tokens_per_block=tokens)


@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 128, 1024])
def test_powers_of_two_are_accepted(tokens):
    assert BuildLimits(tokens_per_block=tokens).tokens_per_block == tokens


def test_dict_round_trip():
    limits = BuildLimits(
        max_batch_size=3, max_num_tokens=77, paged_kv_cache=True, gather_all_token_logits=True
    )
    assert BuildLimits.from_dict(limits.to_dict()) == limits
