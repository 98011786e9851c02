"""Which kernel and tile sizes a linear layer runs with.

Candidates and the default are pure functions of the shape. Measured choices are kept in one
table of the process, which `load_tactics` fills (from an engine's model.cache) and `measured`
returns; nothing is ever measured while serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

# One CUDA core sum per row, for a single token; tensor cores; PyTorch's matrix product.
GEMV, TILES, LIBRARY = "gemv", "tiles", "library"

# Batches up to these share a choice; larger ones share that of the last.
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# From here on the product is limited by arithmetic, and widened weights in cuBLAS win.
FEW_TOKENS = 128

MAX_SPLITS = 16
# Programs that each multiprocessor should get before K is no longer split: partial sums of 64
# tokens cost more than some idle multiprocessors while 16-bit weights come in.
PROGRAMS_PER_PROCESSOR, DENSE_PROGRAMS_PER_PROCESSOR = 1.0, 0.5
# More programs than this are not measured: any GPU is full.
MAX_PROGRAMS = 1024
# Iterations a split of K must keep, to fill its software pipeline.
MIN_ITERATIONS = 2

# What a program may cut K into.
SPLITS = (1, 2, 4, 8, MAX_SPLITS)
# Candidates of each kind that a first run measures, not counting splits: compiling one takes a
# second.
SHORT = {GEMV: 4, TILES: 3, LIBRARY: 1}

ACTIVATION_CODES = ("linear_w8a8", "linear_fp8")
NIBBLES = ("linear_int4", "linear_int4_groups")


class Config(NamedTuple):
    """`rows` outputs and `tokens` tokens a program, `inputs` of them an iteration; `resident`
    programs a multiprocessor where each takes rows in turn."""

    kind: str
    rows: int = 0
    inputs: int = 0
    warps: int = 4
    stages: int = 1
    tokens: int = 1
    splits: int = 1
    resident: int = 0


Key = tuple[str, int, int, int]
_table: dict[Key, Config] = {}

# inputs / warps / bytes of a code: a lane loads 16 bytes at a time, so an iteration of W warps
# takes 512 W bytes of each row.
_ROWS_WARPS = {
    "linear": ((4, 8), (2, 4), (8, 4), (2, 8), (4, 4), (4, 2), (8, 2)),
    "linear_int8": ((4, 4), (4, 8), (4, 2), (8, 4), (8, 2), (2, 4)),
    "linear_w8a8": ((4, 4), (4, 8), (4, 2), (8, 4), (8, 2), (2, 4)),
    # Rounding a token to float8 takes more instructions, which more rows share.
    "linear_fp8": ((8, 4), (4, 4), (8, 2), (4, 8)),
}
# Of programs that keep a token: rows, warps, resident programs, and the most parts of a token that
# leave room in their registers.
_NIBBLES = (
    (8, 2, 4, 2), (4, 4, 4, 2), (4, 2, 8, 2), (4, 4, 2, 5), (2, 4, 2, 5), (4, 2, 4, 4),
    (8, 4, 2, 2), (2, 1, 8, 4), (4, 8, 2, 1), (2, 4, 4, 2), (4, 8, 1, 3), (2, 8, 2, 2),
    (4, 16, 1, 2),
)  # fmt: skip
_CODES_PER_LANE = {
    "linear": 8,
    **dict.fromkeys(("linear_int8", *ACTIVATION_CODES), 16),
    **dict.fromkeys(NIBBLES, 32),
}
OPS = tuple(_CODES_PER_LANE)

# rows, inputs, warps, stages for few tokens; weights are the wide operand.
_FEW = (
    (64, 128, 4, 4), (64, 64, 4, 8), (128, 64, 4, 4), (64, 256, 4, 3), (64, 64, 4, 5),
    (32, 128, 4, 4), (128, 128, 8, 3),
)  # fmt: skip
_FEW_OF_CODES = (
    (64, 128, 4, 4), (64, 256, 4, 3), (64, 128, 8, 3), (32, 128, 4, 4), (128, 128, 8, 3),
    (128, 64, 4, 4),
)  # fmt: skip
# rows, inputs, warps, stages, tokens for many.
_MANY = ((128, 128, 8, 3, 128), (128, 128, 8, 3, 256), (128, 64, 4, 4, 128), (64, 128, 4, 4, 128))


@lru_cache(maxsize=4096)
def token_bucket(tokens: int) -> int:
    return next((bucket for bucket in TOKEN_BUCKETS if tokens <= bucket), TOKEN_BUCKETS[-1])


def candidates(op: str, tokens: int, outputs: int, inputs: int) -> tuple[Config, ...]:
    """Every configuration worth measuring; the first is the default, but for its splits."""
    few = _few_candidates(op, tokens, outputs, inputs)
    gemv = _gemv_candidates(op, inputs) if tokens == 1 else ()
    if op in ACTIVATION_CODES:
        # The codes of one token are read as words.
        gemv = () if inputs % 4 else gemv
        return (*gemv, *few) if tokens <= 64 else _many_candidates()
    library = (Config(LIBRARY),)
    if op == "linear":
        return (*gemv, *library, *(few if tokens <= 64 else ()))
    if tokens > FEW_TOKENS:
        return library
    return (*gemv, *few, *(library if tokens > 16 else ()))


def choose(op: str, tokens: int, outputs: int, inputs: int, processors: int) -> Config:
    """The measured configuration, or the first candidate with enough splits for the device."""
    best = _table.get((op, token_bucket(tokens), outputs, inputs))
    return best or _default(op, tokens, outputs, inputs, processors)


@lru_cache(maxsize=4096)
def _default(op: str, tokens: int, outputs: int, inputs: int, processors: int) -> Config:
    first = candidates(op, tokens, outputs, inputs)[0]
    if first.kind != TILES or tokens > 64:
        return first
    return first._replace(splits=_splits(op, first, tokens, outputs, inputs, processors))


def short_list(
    op: str, tokens: int, outputs: int, inputs: int, processors: int
) -> tuple[Config, ...]:
    """Candidates that take seconds to measure: a few of each kind, the default among them, with
    the splits of K that suit the device, half and twice as many."""
    known = [c for c in candidates(op, tokens, outputs, inputs) if c.splits == 1]
    # Tensor cores are not the place for one token.
    most = SHORT | {TILES: 1} if tokens == 1 else SHORT
    kinds = [[c for c in known if c.kind == kind][:count] for kind, count in most.items()]
    found: list[Config] = []
    for config in (config for kind in kinds for config in kind):
        if config.kind == TILES and tokens <= 64:
            splits = _splits(op, config, tokens, outputs, inputs, processors)
            several = {splits // 2, splits, 2 * splits} & set(SPLITS)
            found += (config._replace(splits=count) for count in sorted(several))
        else:
            found.append(config)
    return tuple(found)


def load_tactics(tactics: Mapping[str, Sequence[str | int]]) -> None:
    """Add choices in the form of `measured`; a newer one replaces an older one. What is no
    candidate of this version, for example after an update, is left out."""
    for name, values in tactics.items():
        op, *shape = name.split("/")
        try:
            tokens, outputs, inputs = map(int, shape)
            config = Config(*values)
        except (TypeError, ValueError):
            continue
        if _is_candidate(config, op, tokens, outputs, inputs):
            _table[op, tokens, outputs, inputs] = config


def is_measured(op: str, tokens: int, outputs: int, inputs: int) -> bool:
    return (op, token_bucket(tokens), outputs, inputs) in _table


def measured() -> dict[str, list[str | int]]:
    """All choices, as JSON holds them: "op/tokens/outputs/inputs" to the fields of a Config."""
    return {"/".join(map(str, key)): list(config) for key, config in sorted(_table.items())}


def record(op: str, tokens: int, outputs: int, inputs: int, config: Config) -> None:
    _table[op, token_bucket(tokens), outputs, inputs] = config


def _is_candidate(config: Config, op: str, tokens: int, outputs: int, inputs: int) -> bool:
    if op not in OPS or tokens not in TOKEN_BUCKETS or config.splits not in SPLITS:
        return False
    known = candidates(op, tokens, outputs, inputs)
    return config._replace(splits=1) in {c._replace(splits=1) for c in known}


def _gemv_candidates(op: str, inputs: int) -> tuple[Config, ...]:
    lanes = 32 * _CODES_PER_LANE[op]
    if op in NIBBLES:
        return _token_keepers(inputs)
    return tuple(Config(GEMV, rows, lanes * warps, warps) for rows, warps in _ROWS_WARPS[op])


def _token_keepers(inputs: int) -> tuple[Config, ...]:
    """Programs that hold a token of `inputs` values in few enough parts."""
    found = []
    for rows, warps, resident, most_parts in _NIBBLES:
        span = 32 * _CODES_PER_LANE[NIBBLES[0]] * warps
        if -(-inputs // span) <= most_parts:
            found.append(Config(GEMV, rows, span, warps, resident=resident))
    return tuple(found)


def _few_candidates(op: str, tokens: int, outputs: int, inputs: int) -> tuple[Config, ...]:
    padded = next((size for size in (16, 32, 64) if tokens <= size), 64)
    return tuple(
        Config(TILES, rows, span, warps, stages, padded, splits)
        for rows, span, warps, stages in (_FEW if op == "linear" else _FEW_OF_CODES)
        for splits in (1, 2, 4, 8)
        if splits == 1
        or (splits * span * MIN_ITERATIONS <= inputs and splits * outputs <= MAX_PROGRAMS * rows)
    )


def _many_candidates() -> tuple[Config, ...]:
    return tuple(Config(TILES, *sizes) for sizes in _MANY)


def _splits(
    op: str, config: Config, tokens: int, outputs: int, inputs: int, processors: int
) -> int:
    programs = -(-outputs // config.rows) * -(-tokens // config.tokens)
    wanted = DENSE_PROGRAMS_PER_PROCESSOR if op == "linear" else PROGRAMS_PER_PROCESSOR
    splits = 1
    while (
        splits < MAX_SPLITS
        and programs * splits < wanted * processors
        and 2 * splits * config.inputs * MIN_ITERATIONS <= inputs
    ):
        splits *= 2
    return splits
