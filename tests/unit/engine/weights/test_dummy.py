"""Dummy weights: the same values whatever part is read, and statistics of a fresh model."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoint.dummy import DummySource, open_dummy
from engine.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=600,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=640,
)


@pytest.mark.parametrize("cut", [1, 100, 255, 256, 257, 512, 599])
def test_slices_equal_the_whole(cut):
    whole = DummySource("w", (600, 33)).read()
    assert whole.shape == (600, 33)
    source = DummySource("w", (600, 33))
    parts = [source.rows(start, min(start + cut, 600)) for start in range(0, 600, cut)]
    assert torch.equal(torch.cat(parts), whole)


def test_matrices_are_small_normal_numbers():
    values = DummySource("w", (2000, 500)).read().float()
    assert abs(values.mean().item()) < 1e-4
    assert abs(values.std().item() - 0.02) < 1e-4
    # Rows do not repeat, as they would if every block had one seed.
    assert values.unique(dim=0).shape[0] == 2000


def test_norms_are_ones():
    assert torch.equal(DummySource("norm", (7,)).rows(2, 5), torch.ones(3, dtype=torch.bfloat16))


def test_tensors_differ_by_name():
    assert not torch.equal(DummySource("a", (4, 4)).read(), DummySource("b", (4, 4)).read())


def test_checkpoint_is_complete():
    checkpoint = open_dummy(CONFIG)
    checkpoint.check()
    assert checkpoint.config == CONFIG
    assert checkpoint.generation["eos_token_id"] == 2
