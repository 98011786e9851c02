"""Clipping by numbers that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from engine.errors import UserError
from utils.quantisation import awq
from utils.quantisation.awq import GroupHessian, choose_factor, sample_rows, search_ranges

CPU = torch.device("cpu")
# Two inputs of a group: only the second ever set, only the first, both but not together, and
# both always alike.
SECOND, FIRST = [[0.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]
APART, TOGETHER = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]
# 3 · 0.95 · 8/7 - 0.4: with the range 0.95 · 8 its error of 0.4 undoes the -0.4 of the weight 8.
BALANCED = 20 / 7


@pytest.mark.parametrize(
    ("weights", "hessian", "amax"),
    [
        # A step of 1 holds 3 exactly and clips 8 to 7; who weighs 8 only, does not clip.
        ([8.0, 3.0], SECOND, 7.0),
        ([8.0, 3.0], FIRST, 8.0),
        # The code -8 holds -8 without any clipping.
        ([-8.0, 3.0], APART, 7.0),
        # Squared errors 0.327, 0.276, 0.320, 0.459, … of the ranges 8, 7.8, 7.6, 7.4, …
        ([8.0, BALANCED], APART, 7.8),
        # Squares of the summed errors: 0.327, 0.082, 0, 0.082, …
        ([8.0, BALANCED], TOGETHER, 7.6),
        # A group of zeros has no range, inputs that are never set no errors.
        ([0.0, 0.0], APART, 1.0),
        ([8.0, 3.0], [[0.0, 0.0], [0.0, 0.0]], 8.0),
    ],
)
def test_range_by_hand(weights, hessian, amax):
    found_NR, _ = search_ranges(torch.tensor([weights]), torch.tensor([hessian]))
    torch.testing.assert_close(found_NR, torch.tensor([[amax]]))


def test_error_by_hand():
    _, error = search_ranges(torch.tensor([[8.0, BALANCED]]), torch.tensor([APART]))
    # Codes 7 and 3 of the step 7.8 / 7.
    assert error.item() == pytest.approx(0.2**2 + (3 * 7.8 / 7 - 20 / 7) ** 2, rel=1e-4)


def test_groups_and_chunks_do_not_mix(monkeypatch):
    w_NK = torch.tensor([[8.0, 3.0, -8.0, 3.0], [16.0, 6.0, 0.0, 0.0], [-1.0, 0.0, 8.0, 3.0]])
    hessian_RGG = torch.tensor([SECOND, APART])
    expected_NR = [[7.0, 7.0], [14.0, 1.0], [0.875, 8.0]]
    for chunk in (1, 8, 100):
        monkeypatch.setattr(awq, "CHUNK", chunk)
        found_NR, _ = search_ranges(w_NK.bfloat16(), hessian_RGG)
        assert found_NR.is_contiguous()
        torch.testing.assert_close(found_NR[:, 0], torch.tensor(expected_NR)[:, 0])
    # Of [8, 3] on inputs apart: 0.184 unclipped, and 0.2² + (3 · 7.8/7 - 3)² = 0.158 at 7.8.
    torch.testing.assert_close(found_NR[:, 1], torch.tensor([7.0, 1.0, 7.8]))


def test_hessian_by_hand():
    hessian = GroupHessian(4, 2, CPU)
    hessian.add(torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[0.0, 1.0, 1.0, 0.0]]]).bfloat16())
    hessian.add(torch.tensor([[2.0, 0.0, 0.0, 1.0]]))
    # Groups (1, 2), (0, 1), (2, 0) and (3, 4), (1, 0), (0, 1).
    expected_RGG = [[[5.0, 2.0], [2.0, 5.0]], [[10.0, 12.0], [12.0, 17.0]]]
    assert hessian.sum_RGG.tolist() == expected_RGG


def test_factor_by_hand():
    """The factor (1, 0.4) turns the weights (7, 0.4) into codes that are exact."""
    hessian_RGG = torch.tensor([APART])
    none, exact, wrong = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.4]), torch.tensor([0.4, 1])
    weights = [torch.tensor([[7.0, 0.4]])]
    assert choose_factor([none, wrong, exact], weights, hessian_RGG) is exact
    # Another layer with the same input has more to lose: 10 / 0.4 lies between two codes.
    weights.append(torch.tensor([[70.0, 10.0]]))
    assert choose_factor([exact, none], weights, hessian_RGG) is none


@pytest.mark.parametrize(("rows", "sampled"), [(3, 3), (512, 512), (513, 257), (1536, 512)])
def test_sampled_rows_are_spread(rows, sampled):
    w_NK = torch.arange(rows, dtype=torch.float32).unsqueeze(1)
    found = sample_rows(w_NK)
    assert len(found) == sampled
    assert (found[0, 0].item(), found[-1, 0].item()) == (0, (sampled - 1) * -(-rows // 512))


def test_inputs_that_are_not_finite():
    hessian = GroupHessian(2, 2, CPU)
    hessian.add(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(
        UserError, match=r"gave layers\.3\.o_proj inputs that are not finite; use --dtype bfloat16"
    ):
        hessian.check("layers.3.o_proj")
