"""What a decode step does outside the layers: best logits, stops, places and rotation angles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import api, reference
from engine.kernels.rows import ANY_TOKEN, FinishReason, RowState, StopRules
from engine.sampling import Sampler, SamplingParams
from tests.kernels.helpers import DTYPES, random
from tests.kernels.triton_mode import DEVICE, prepare_interpreter, run_compiled

prepare_interpreter()

from engine.kernels.triton._vocabulary import TILE  # noqa: E402
from engine.kernels.triton.argmax import argmax  # noqa: E402
from engine.kernels.triton.draw import draw  # noqa: E402
from engine.kernels.triton.logsumexp import logsumexp  # noqa: E402
from engine.kernels.triton.place_tokens import place_tokens  # noqa: E402
from engine.kernels.triton.rotary_angles import rotary_angles  # noqa: E402
from engine.kernels.triton.take_tokens import BLOCK, take_tokens  # noqa: E402

TRITON = {
    function.__name__: function
    for function in (argmax, draw, logsumexp, place_tokens, rotary_angles, take_tokens)
}
EMPTY = 999
BLOCK_TOKENS = 5


def both(op: str) -> Any:
    functions = [getattr(reference, op), TRITON[op]]
    return pytest.mark.parametrize("run", functions, ids=["reference", "triton"])


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@both("argmax")
@DTYPES
@pytest.mark.parametrize("rows, vocab", [(1, 1), (1, 20 * TILE), (3, 2 * TILE + 1), (40, 77)])
def test_argmax_finds_the_one_best(run: Callable, dtype: torch.dtype, rows: int, vocab: int):
    logits = random(rows, vocab + 3, dtype=dtype, device=DEVICE)[:, :vocab]
    best = [row * 7919 % vocab for row in range(rows)]
    logits[range(rows), best] = 20.0
    assert run(logits).tolist() == best
    assert run(logits).tolist() == best


@both("argmax")
@DTYPES
def test_argmax_of_equal_zero_infinite_and_no_numbers(run: Callable, dtype: torch.dtype):
    low, vocab = -math.inf, 3 * TILE
    rows: dict[int, dict[int, float]] = {
        5: {5: 2.0, 6: 2.0, TILE: 2.0, vocab - 1: 2.0},
        TILE + 1: {TILE + 1: -0.0, TILE + 2: 0.0, 2: -1e-7},
        9: {9: 0.0, 10: -0.0},
        7: {3: math.inf, 7: math.nan, 8: -math.nan, 9: math.inf},
        2000: {2000: -math.nan, 2001: math.inf},
        2: {0: -60000.0, 1: -2.0, 2: -1.0},
        0: {},
    }
    logits = torch.full((len(rows), vocab), low, dtype=dtype, device=DEVICE)
    for row, values in enumerate(rows.values()):
        logits[row, list(values)] = tensor(list(values.values())).to(dtype)
    assert run(logits).tolist() == list(rows)


@both("logsumexp")
@DTYPES
@pytest.mark.parametrize("rows, vocab", [(1, 1), (3, 9 * TILE + 5), (40, 77)])
def test_logsumexp(run: Callable, dtype: torch.dtype, rows: int, vocab: int):
    logits = 20 * random(rows, vocab, dtype=dtype, device=DEVICE) - 60
    logits[:, 1::2] = -math.inf
    truth = logits.double().exp().sum(-1).log()
    torch.testing.assert_close(run(logits).double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")
@both("logsumexp")
def test_logsumexp_of_infinite_and_no_numbers(run: Callable):
    logits = torch.full((4, 3 * TILE), -math.inf, device=DEVICE)
    logits[1, TILE] = math.inf
    logits[2, [TILE, 5]] = tensor([math.nan, 1.0])
    logits[3, [TILE, 5]] = -3e38
    found = run(logits)
    assert found[:2].tolist() == [-math.inf, math.inf] and found[2].isnan()
    assert found[3].item() == pytest.approx(-3e38)


@both("draw")
@pytest.mark.parametrize("rows, vocab", [(1, 1), (2, 9 * TILE + 5), (40, 77)])
def test_a_draw_inverts_the_distribution_function(run: Callable, rows: int, vocab: int):
    """At numbers in the middle of a token's share, for tokens here and there."""
    scores = 3 * random(rows, vocab, device=DEVICE)
    scores[:, 1::3] = -math.inf
    sums = torch.softmax(scores.double(), -1).cumsum(-1)
    tokens = [3 * (row * 7919 % -(-vocab // 3)) for row in range(rows)]
    before = [sums[row, token - 1].item() if token else 0.0 for row, token in enumerate(tokens)]
    shares = torch.softmax(scores.double(), -1)[range(rows), tokens]
    uniform = tensor(before).double() + shares / 2
    assert run(scores, uniform).tolist() == tokens


@both("draw")
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_takes_no_banned_token_unless_all_are(run: Callable, uniform: float):
    scores = torch.full((3, 3 * TILE), -math.inf, device=DEVICE)
    scores[0, 2 * TILE] = -1e38
    scores[1, [TILE - 1, TILE]] = 0.0
    drawn = run(scores, torch.full((3,), uniform, dtype=torch.float64, device=DEVICE)).tolist()
    assert drawn == [2 * TILE, TILE - (uniform < 0.5), 3 * TILE - 1]


@both("rotary_angles")
@pytest.mark.parametrize("half", [64, 3])
def test_angles_of_long_contexts(run: Callable, half: int):
    """cos and sin of the fp32 angle, which at position 200000 has steps of 2⁻⁶."""
    positions = torch.tensor([0, 1, 4095, 99_991, 105_616, 131_071, 200_000])
    inverse = 5e6 ** -(torch.arange(half) / half)
    cos, sin = run(positions.to(DEVICE), inverse.to(DEVICE), 1.25)
    angles = (positions[:, None].float() * inverse).double()
    for actual, truth in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(actual.cpu().double(), 1.25 * truth, rtol=0, atol=3e-7)


@both("rotary_angles")
def test_every_token_may_have_its_own_frequencies(run: Callable):
    positions, inverse = tensor([3, 100]), tensor([[1.0, 0.1], [0.5, 0.01]])
    cos, sin = run(positions, inverse, 1.0)
    angles = torch.tensor([[3.0, 0.3], [50.0, 1.0]])
    torch.testing.assert_close(cos.cpu(), angles.cos(), rtol=0, atol=4e-6)
    torch.testing.assert_close(sin.cpu(), angles.sin(), rtol=0, atol=4e-6)


@both("place_tokens")
def test_places_of_tokens(run: Callable):
    """Rows of 1 (padding), 2, 5, 6 and 13 tokens, 2 columns before them; blocks of 5."""
    table = tensor([[9, 9, 9], [7, 0, 0], [3, 0, 0], [8, 6, 0], [1, 2, 4]]).int()
    places = run(tensor([3, 4, 7, 8, 15]), 2, table, BLOCK_TOKENS)
    assert places.positions_B.tolist() == [0, 1, 4, 5, 12]
    assert places.kv_lens_B.tolist() == [0, 2, 5, 6, 13]
    assert places.slots_B.tolist() == [-1, 36, 19, 30, 22]
    dtypes = [place.dtype for place in places]
    assert dtypes == [torch.int64, torch.int32, torch.int64]


def make_rows(history: list[list[int]], starts: list[int], **lists: list) -> RowState:
    width = max(map(len, history)) + 3
    padded = [row + [EMPTY] * (width - len(row)) for row in history]
    count = len(history)
    return RowState(
        history_BH=tensor(padded),
        ends_B=tensor([len(row) for row in history]),
        reasons_B=tensor(lists.get("reasons", [0] * count)),
        tokens_B=tensor([-1] * count),
        num_alive=tensor([count]),
        starts_B=tensor(starts),
        pad_ids_B=tensor([50 + row for row in range(count)]),
        rules=StopRules(
            tensor(lists["most"]), tensor(lists["end_ids"]), *map(tensor, lists.get("words", ()))
        ),
    )


@both("take_tokens")
def test_a_token_ends_a_row_for_the_first_reason_that_applies(run: Callable):
    """It goes on; full; an end id, also in a full row; a stop word, also with each; had ended.

    The words are 6 4, which has begun with the row's new token, and 8."""
    chosen = [5, 5, 9, 9, 4, 4, 8, 4]
    most = [3, 2, 9, 2, 9, 2, 9, 2]
    end_ids = [[9, 8, EMPTY] if row == 6 else [9, EMPTY, EMPTY] for row in range(8)]
    words = [[6, 4], [ANY_TOKEN, 8], [EMPTY, EMPTY]]
    rows = make_rows(
        [[1, 1, 6]] * 8,
        [2] * 8,
        most=most,
        end_ids=end_ids,
        reasons=[0] * 7 + [FinishReason.END_ID],
        words=([words] * 8, [[2, 1, 0]] * 8),
    )
    run(rows, tensor(chosen))
    assert rows.reasons_B.tolist() == [0, 3, 1, 1, 2, 2, 1, 1]
    assert rows.tokens_B.tolist() == [5, 5, 9, 9, 4, 4, 8, 57]
    assert rows.ends_B.tolist() == [4] * 7 + [3]
    assert rows.history_BH[:, 2:5].tolist() == [
        *([6, token, EMPTY] for token in chosen[:7]),
        [6, EMPTY, EMPTY],
    ]
    assert rows.num_alive.tolist() == [1]


@both("take_tokens")
def test_a_stop_word_lies_in_the_output(run: Callable):
    """6 5 4 after one, two and three new tokens, the wrong order, and no word at all."""
    history = [[6, 5], [1, 6, 5], [1, 1, 6, 5], [1, 1, 5, 6], [1, 1, 6, 5]]
    words = [[[6, 5, 4]]] * 4 + [[[EMPTY] * 3]]
    rows = make_rows(
        [[3, 3, *row] for row in history],
        [4, 4, 4, 4, 4],
        most=[9] * 5,
        end_ids=[[EMPTY]] * 5,
        words=(words, [[3]] * 4 + [[0]]),
    )
    run(rows, tensor([4] * 5))
    assert rows.reasons_B.tolist() == [0, 0, 2, 0, 0]
    assert rows.num_alive.tolist() == [4]


@both("take_tokens")
def test_rows_beyond_a_block_are_counted(run: Callable):
    count = 2 * BLOCK + 3
    rows = make_rows([[1]] * count, [1] * count, most=[9] * count, end_ids=[[2]] * count)
    chosen = [2 if row % 3 else 5 for row in range(count)]
    run(rows, tensor(chosen))
    assert rows.num_alive.item() == chosen.count(5) == rows.reasons_B.eq(0).sum()
    assert rows.history_BH[:, 1].tolist() == chosen


VOCAB = 23


def random_requests(seed: int) -> tuple[list[SamplingParams], list[list[int]]]:
    """Rows that stop at different steps: few tokens, so that end ids and words come."""
    generator = torch.Generator().manual_seed(seed)

    def some(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    params, prompts = [], []
    for row in range(7):
        [most, ends, words, length] = some(4, 4)
        params.append(
            SamplingParams(
                max_new_tokens=2 + 4 * most,
                end_ids=tuple(some(VOCAB, ends)),
                pad_id=row,
                top_k=5 if row < seed else 1,
                random_seed=row,
                stop_words=(tuple(some(VOCAB, 2)), (row,)) if words == seed else (),
            )
        )
        prompts.append(some(VOCAB, 1 + length))
    return params, prompts


@pytest.mark.parametrize("seed", range(3))
def test_triton_leaves_the_buffers_of_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Step by step to the end and beyond, with a row of padding, on the sampler's own buffers."""
    params, prompts = random_requests(seed)
    ours, truth = (Sampler(params, prompts, VOCAB, DEVICE) for _ in range(2))
    for sampler in (ours, truth):
        sampler.reasons_B[6] = FinishReason.LENGTH.value
    lookback = truth.history.lookback
    table = torch.randperm(7 * 9, generator=torch.Generator().manual_seed(seed))
    table = table.view(7, 9).int().to(DEVICE)
    counts = []
    for step in range(17):
        logits = random(7, VOCAB, dtype=torch.bfloat16, device=DEVICE, seed=100 * seed + step)
        for sampler, functions in ((ours, TRITON), (truth, vars(reference))):
            for op in ("argmax", "draw", "take_tokens"):
                monkeypatch.setattr(api, op, functions[op])
            sampler.step(logits)
        state = truth.state_dict()
        for name, buffer in ours.state_dict().items():
            assert torch.equal(buffer, state[name]), (name, step)
        ends = truth.history.ends_B
        places = (
            op(ends, lookback, table, BLOCK_TOKENS) for op in (place_tokens, reference.place_tokens)
        )
        assert all(map(torch.equal, *places))
        counts.append(truth.num_alive.item())
    assert counts[-1] == 0 and len(set(counts)) > 2 and counts[0] <= 6


def test_kernels_compile_without_spills() -> None:
    lines = run_compiled("tests.kernels.triton_compile", "tests.kernels.rows_cases", "90")
    found = lines.splitlines()
    assert len(found) == 8 and all(" 0 bytes spilled" in line for line in found), found


def test_large_angles_are_reduced_exactly() -> None:
    """By CUDA's cosf, which knows angles of more than 105615 radians, not by cos.approx."""
    ptx = run_compiled("tests.kernels.rows_cases")
    assert "0f47CE4780" in ptx and "cos.approx" not in ptx and "sin.approx" not in ptx
