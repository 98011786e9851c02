"""Truth: the algorithm of the paper's section 3 column by column, each time with an inverse of its
own in float64, and rounding to the nearest on the same grid.
"""

# Dimensions: N outputs, K inputs, T tokens.

from __future__ import annotations

import pytest
import torch

from engine.errors import UserError
from utils.quantisation import gptq
from utils.quantisation.gptq import Hessian, fit_grid, round_matrix, round_nearest

GROUP = 32


@pytest.fixture
def inputs_TK() -> torch.Tensor:
    """Correlated inputs, as a network's are; uncorrelated ones leave nothing to make up for."""
    generator = torch.Generator().manual_seed(3)
    mix_KK = torch.randn(160, 160, generator=generator) / 12 + torch.eye(160)
    return torch.randn(400, 160, generator=generator) @ mix_KK


@pytest.fixture
def weight_NK() -> torch.Tensor:
    return torch.randn(24, 160, generator=torch.Generator().manual_seed(4)) * 0.05


def hessian_of(inputs_TK):
    hessian = Hessian(inputs_TK.shape[1], inputs_TK.device)
    for batch in inputs_TK.unflatten(0, (4, 1, -1)):
        hessian.add(batch)
    return hessian.sum_KK


def round_one_by_one(weight_NK, hessian_KK, grid):
    """Codes by equations 2 and 3 of the paper: the inverse is that of the columns still open."""
    w_NK, hessian_KK = weight_NK.double().clone(), hessian_KK.double().clone()
    hessian_KK.diagonal().add_(0.01 * hessian_KK.diagonal().mean())
    codes_NK = torch.empty_like(w_NK)
    for column in range(w_NK.shape[1]):
        scale_N = grid.scale_NR[:, column // GROUP].double()
        zero_N = grid.zero_NR[:, column // GROUP].double()
        code_N = (torch.round(w_NK[:, column] / scale_N) + zero_N).clamp(0, 15)
        inverse = torch.linalg.inv(hessian_KK[column:, column:])
        error_N = (w_NK[:, column] - (code_N - zero_N) * scale_N) / inverse[0, 0]
        w_NK[:, column:] -= torch.outer(error_N, inverse[0])
        codes_NK[:, column] = code_N
    return codes_NK.to(torch.uint8)


def test_the_hessian_is_the_sum_of_outer_products(inputs_TK):
    truth_KK = torch.einsum("ti,tj->ij", inputs_TK.double(), inputs_TK.double())
    torch.testing.assert_close(hessian_of(inputs_TK).double(), truth_KK, rtol=1e-4, atol=1e-3)


def test_blocks_give_what_single_columns_give(inputs_TK, weight_NK):
    """160 columns are a whole block of 128 and a part of one."""
    hessian_KK = hessian_of(inputs_TK)
    found = round_matrix(weight_NK, hessian_KK, GROUP)
    truth_NK = round_one_by_one(weight_NK, hessian_KK, found.grid)
    # A value between two codes may fall to either side in fp32, and then changes those after it.
    assert (found.codes_NK != truth_NK).float().mean() < 0.01
    assert (found.codes_NK.int() - truth_NK.int()).abs().max() <= 1


def test_the_output_changes_less_than_by_rounding_to_the_nearest(inputs_TK, weight_NK):
    found = round_matrix(weight_NK, hessian_of(inputs_TK), GROUP)
    nearest = round_nearest(weight_NK, found.grid)

    def output_error(rounded):
        return ((rounded.weight_NK - weight_NK) @ inputs_TK.T).norm()

    assert output_error(found) < 0.8 * output_error(nearest)
    assert (found.weight_NK - weight_NK).norm() > (nearest.weight_NK - weight_NK).norm()


def test_independent_inputs_are_rounded_to_the_nearest(weight_NK):
    hessian_KK = torch.diag(torch.arange(160, dtype=torch.float32))
    found = round_matrix(weight_NK, hessian_KK, GROUP)
    assert torch.equal(found.codes_NK, round_nearest(weight_NK, found.grid).codes_NK)


def test_grid_by_hand():
    weight_NK = torch.tensor(
        [
            [-0.5, 0.0, 1.0, 0.22],  # from -0.5 to 1: steps of 0.1, five of them below zero
            [0.0, 0.7, 1.4, 0.7],  # nothing below zero, which still is the second code
            [-1.5, -0.3, -0.2, 0.0],  # nothing above it
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    grid = fit_grid(weight_NK, 4)
    assert grid.zero_NR.flatten().tolist() == [5, 1, 15, 1]
    halves = torch.tensor([0.1, 0.1, 0.1, 1.0]).half().float()
    torch.testing.assert_close(grid.scale_NR.flatten(), halves, rtol=1e-3, atol=0)
    assert torch.equal(grid.scale_NR.half().float(), grid.scale_NR)
    nearest = round_nearest(weight_NK, grid)
    assert nearest.codes_NK.tolist() == [
        [0, 5, 15, 7],
        [1, 8, 15, 8],
        [0, 12, 13, 15],
        [1, 1, 1, 1],
    ]
    expected = torch.tensor([-0.5, 0.0, 1.0, 0.2])
    torch.testing.assert_close(nearest.weight_NK[0], expected, rtol=1e-3, atol=0)


def test_a_singular_hessian_is_damped(weight_NK):
    """One text of three tokens says nothing of most directions."""
    few_TK = torch.randn(3, 160, generator=torch.Generator().manual_seed(5)) * 100
    found = round_matrix(weight_NK, few_TK.T @ few_TK, GROUP)
    assert torch.isfinite(found.weight_NK).all()


def test_more_damping_where_rounding_errors_need_it():
    """An indefinite matrix, as fp32 sums can leave one, needs more than the first share."""
    hessian_KK = torch.eye(160) + 0.9 * (torch.ones(160, 160) - torch.eye(160))
    hessian_KK[0, 1] = hessian_KK[1, 0] = 1.2
    assert torch.linalg.eigvalsh(hessian_KK + 0.01 * torch.eye(160))[0] < 0
    factor_KK = gptq.inverse_factor(hessian_KK)
    inverse_KK = torch.linalg.inv(hessian_KK.double() + torch.eye(160).double())
    torch.testing.assert_close(
        factor_KK.T.double() @ factor_KK.double(), inverse_KK, rtol=1e-3, atol=1e-4
    )


def test_inputs_that_are_not_finite_are_refused(weight_NK):
    hessian_KK = torch.eye(160)
    hessian_KK[7, 7] = float("inf")
    with pytest.raises(UserError, match="inputs that are not finite; use --dtype bfloat16"):
        round_matrix(weight_NK, hessian_KK, GROUP)
