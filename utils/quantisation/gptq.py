"""GPTQ: rounds a weight matrix so that its output on given inputs changes least.

https://arxiv.org/abs/2210.17323. Inputs are rounded one after another, and the error of each is
made up for by those that still follow. Pure functions on tensors; knows no models and no files.
"""

# Dimensions: N outputs, K inputs, R groups along K, T tokens.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError

HIGHEST_CODE = 15
# A zero point is stored minus one (GPTQ-for-LLaMa), so that 0 cannot be stored.
LOWEST_ZERO = 1
# Added to the diagonal of the Hessian, as a share of its mean (section 3.3 of the paper).
DAMPING = 0.01
# Factor of a second and further tries, if rounding errors left the Hessian indefinite.
MORE_DAMPING = 10.0
MAX_DAMPING = 100.0
# Columns whose effect on later ones is applied at once.
BLOCK = 128


class Grid(NamedTuple):
    """What the codes of a group mean: weight = (code - zero) · scale.

    scale_NR fp32 with the values of fp16; zero_NR fp32 with whole values 1…15.
    """

    scale_NR: Tensor
    zero_NR: Tensor


class Rounded(NamedTuple):
    """A rounded matrix: codes uint8 0…15 [N, K] on its grid."""

    codes_NK: Tensor
    grid: Grid

    @property
    def weight_NK(self) -> Tensor:
        """fp32; what a reader of the codes gets."""
        codes_NRG = self.codes_NK.unflatten(1, (self.grid.scale_NR.shape[1], -1))
        zero, scale = self.grid.zero_NR.unsqueeze(-1), self.grid.scale_NR.unsqueeze(-1)
        return ((codes_NRG - zero) * scale).flatten(1)

    def cpu(self) -> Rounded:
        return Rounded(self.codes_NK.cpu(), Grid(self.grid.scale_NR.cpu(), self.grid.zero_NR.cpu()))


class Hessian:
    """Sum of x xᵀ over the inputs x of a layer, fp32 [K, K]."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_KK = torch.zeros(inputs, inputs, device=device)

    def add(self, x: Tensor) -> None:
        """Take in the inputs [..., K]."""
        x_TK = x.flatten(0, -2).float()
        self.sum_KK.addmm_(x_TK.T, x_TK)


def fit_grid(w_NK: Tensor, group_size: int) -> Grid:
    """The grid whose 16 values reach from the smallest to the largest weight of each group."""
    w_NRG = w_NK.float().unflatten(1, (-1, group_size))
    low_NR, high_NR = w_NRG.amin(-1).clamp(max=0), w_NRG.amax(-1).clamp(min=0)
    scale_NR = (high_NR - low_NR) / HIGHEST_CODE
    # A group of zeros has no range; any scale does.
    scale_NR = torch.where(scale_NR > 0, scale_NR, 1.0)
    zero_NR = torch.round(-low_NR / scale_NR)
    # Where the lowest zero is not low enough, the values above it have fewer codes.
    raised = high_NR / (HIGHEST_CODE - LOWEST_ZERO)
    scale_NR = torch.where((zero_NR < LOWEST_ZERO) & (raised > 0), raised, scale_NR)
    smallest = torch.finfo(torch.float16).smallest_normal
    return Grid(scale_NR.half().float().clamp(min=smallest), zero_NR.clamp(min=LOWEST_ZERO))


def round_nearest(w_NK: Tensor, grid: Grid) -> Rounded:
    """Every weight by itself."""
    groups = grid.scale_NR.shape[1]
    zero, scale = grid.zero_NR.unsqueeze(-1), grid.scale_NR.unsqueeze(-1)
    w_NRG = w_NK.float().unflatten(1, (groups, -1))
    codes_NRG = (torch.round(w_NRG / scale) + zero).clamp(0, HIGHEST_CODE)
    return Rounded(codes_NRG.flatten(1).to(torch.uint8), grid)


def round_matrix(w_NK: Tensor, hessian_KK: Tensor, group_size: int) -> Rounded:
    """`w_NK` in groups of `group_size`, rounded for inputs with the Hessian `hessian_KK`.

    The grids are those of the weights before any error was passed on (static groups), and inputs
    come in their own order: on the bundled model neither the other grids nor the order of the
    Hessian's diagonal (act-order) gave a lower perplexity. UserError for a Hessian that is not
    finite.
    """
    grid = fit_grid(w_NK, group_size)
    factor_KK = inverse_factor(hessian_KK)
    w_NK = w_NK.float().clone()
    codes_NK = torch.empty_like(w_NK, dtype=torch.uint8)
    for start in range(0, w_NK.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, w_NK.shape[1]))
        groups = [column // group_size for column in range(columns.start, columns.stop)]
        block_KK = factor_KK[columns, columns]
        codes_NK[:, columns], errors_NB = _round_block(w_NK[:, columns], block_KK, grid, groups)
        w_NK[:, columns.stop :] -= errors_NB @ factor_KK[columns, columns.stop :]
    return Rounded(codes_NK, grid)


def _round_block(
    w_NB: Tensor, factor_BB: Tensor, grid: Grid, groups: list[int]
) -> tuple[Tensor, Tensor]:
    """Codes of consecutive columns, and their errors for the columns after them."""
    w_NB, errors_NB = w_NB.clone(), torch.empty_like(w_NB)
    codes_NB = torch.empty_like(w_NB, dtype=torch.uint8)
    for column, group in enumerate(groups):
        scale_N, zero_N = grid.scale_NR[:, group], grid.zero_NR[:, group]
        code_N = (torch.round(w_NB[:, column] / scale_N) + zero_N).clamp(0, HIGHEST_CODE)
        error_N = w_NB[:, column] - (code_N - zero_N) * scale_N
        errors_NB[:, column] = error_N / factor_BB[column, column]
        w_NB[:, column:] -= errors_NB[:, column, None] * factor_BB[column, column:]
        codes_NB[:, column] = code_N
    return codes_NB, errors_NB


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse.

    Its row k, divided by its diagonal, says how later inputs make up for the error of input k.
    """
    mean = hessian_KK.diagonal().mean()
    if not torch.isfinite(mean):
        raise UserError(
            "the calibration gave inputs that are not finite; use --dtype bfloat16 or float32"
        )
    damped_KK = hessian_KK.clone()
    # An input that was always zero is independent of the others and rounded to the nearest.
    damped_KK.diagonal().masked_fill_(hessian_KK.diagonal() == 0, 1.0)
    base, share = damped_KK.diagonal().clone(), DAMPING
    while True:
        damped_KK.diagonal().copy_(base + share * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed:
            upper_KK, failed = torch.linalg.cholesky_ex(
                torch.cholesky_inverse(lower_KK), upper=True
            )
        if not failed:
            return upper_KK
        share *= MORE_DAMPING
        assert share <= MAX_DAMPING, "a positive diagonal this large is definite"
