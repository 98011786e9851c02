"""The key/value cache: one block of memory per rank, and the host tables that say who owns what.

A contiguous cache is a paged one whose block holds a whole sequence; nothing here or in the
attention kernels knows the difference. Knows nothing of layers, requests or sampling.

Dimensions: G kv heads (of this rank), D head size, B sequences, M blocks per sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import RequestError
from engine.quant import KVStorage
from engine.transfer import longs

PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a quantised cache stores; another stores the engine's dtype.
CODE_DTYPES = {KVStorage.INT8: torch.int8, KVStorage.FP8: torch.float8_e4m3fn}


class LayerCache(NamedTuple):
    """Keys and values of one layer, [blocks, G, block_tokens, D] each.

    One block of one head is a contiguous [block_tokens, D] matrix: a sequence within one block is
    the view [G, S, D], and a paged kernel reads whole rows.

    With scales, fp32 [G], both are codes: int8 -127…127 or float8_e4m3fn, and the value of a code
    of head g is code · scale[g].
    """

    k: Tensor
    v: Tensor
    k_scale_G: Tensor | None = None
    v_scale_G: Tensor | None = None


class KVCache:
    """The storage of all layers of a rank, left uninitialised: kernels read valid slots only.

    Codes come with `scales`, fp32 [layers, 2, G]: those of a layer's keys, then of its values.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scales: Tensor | None = None,
    ) -> None:
        if scales is None:
            assert dtype in PLAIN_DTYPES, f"no cache of {dtype} without scales"
            layer_scales: Iterable[Iterable[Tensor]] = [()] * layers
        else:
            assert dtype in CODE_DTYPES.values(), f"no cache of {dtype} with scales"
            assert scales.shape == (layers, 2, kv_heads), scales.shape
            layer_scales = scales.float().to(device)
        shape = (layers, 2, num_blocks, kv_heads, block_tokens, head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self._layers = tuple(
            LayerCache(*keys_and_values, *scale_2G)
            for keys_and_values, scale_2G in zip(self._data, layer_scales, strict=True)
        )

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_blocks(self) -> int:
        return self._data.shape[2]

    @property
    def block_tokens(self) -> int:
        return self._data.shape[4]

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def layer(self, slot: int) -> LayerCache:
        """Views of the local layer `slot`; writes through them change the cache."""
        return self._layers[slot]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], tokens: int | None = None) -> None:
        """Copy block src to dst for every (src, dst), in all layers, as if all at once.

        `tokens` limits the copy to a block's first positions when no more of them are filled.
        """
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self._data.device).unbind(1)
        # Layer by layer, so that the copies in flight are a small part of a contiguous cache.
        # As integers where PyTorch cannot index the storage type.
        is_fp8 = self._data.dtype == torch.float8_e4m3fn
        for keys_and_values in self._data.view(torch.int8) if is_fp8 else self._data:
            filled = keys_and_values[:, :, :, :tokens]
            filled.index_copy_(1, targets, filled.index_select(1, sources))


@dataclass
class _Row:
    """One sequence: its blocks in order, None where trimmed, and the positions filled."""

    blocks: list[int | None] = field(default_factory=list)
    length: int = 0

    def held(self) -> Iterable[int]:
        return (block for block in self.blocks if block is not None)


class BlockTables:
    """Host-side allocator: which cache blocks each sequence owns.

    Rows are small integers; a row's table entries past its blocks, and those freed by `trim`,
    are 0. No block is set aside: block 0 belongs to a sequence like any other, so attention must
    not read through such an entry, and padding tokens carry a negative slot instead of pointing
    at scratch memory (which would double the contiguous cache of a single sequence).

    Full blocks may be shared. A block with room belongs to one row: `fork` and `reorder` give
    every other sharer a copy of its own at once, so that `append` never has to copy.
    """

    def __init__(self, num_blocks: int, block_tokens: int, max_blocks_per_sequence: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.max_blocks_per_sequence = max_blocks_per_sequence
        self._free = list(reversed(range(num_blocks)))
        self._owners: Counter[int] = Counter()
        self._rows: list[_Row | None] = []

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_rows(self) -> int:
        """Rows of `table()`: one more than the highest open row."""
        return len(self._rows)

    def length(self, row: int) -> int:
        """Positions filled in `row`, trimmed ones included."""
        return self._row(row).length

    def table(self, rows: Sequence[int] | None = None) -> Tensor:
        """Block numbers of `rows` (default: all, closed ones empty), int32 [B, M], on the CPU."""
        chosen = [self._rows[row] for row in (range(self.num_rows) if rows is None else rows)]
        padding = [0] * self.max_blocks_per_sequence
        numbers: list[int] = []
        for entry in chosen:
            blocks = [block or 0 for block in entry.blocks] if entry else []
            numbers += blocks + padding[len(blocks) :]
        return longs(numbers).int().view(len(chosen), self.max_blocks_per_sequence)

    def open(self, num_sequences: int) -> list[int]:
        """Empty rows for new sequences: closed ones first, lowest number first."""
        closed = [row for row, entry in enumerate(self._rows) if entry is None][:num_sequences]
        rows = closed + list(range(self.num_rows, self.num_rows + num_sequences - len(closed)))
        self._rows += [None] * (num_sequences - len(closed))
        for row in rows:
            self._rows[row] = _Row()
        return rows

    def append(self, row: int, tokens: int) -> None:
        """Grow `row` by `tokens` positions.

        Raises RequestError, and changes nothing, when the blocks do not suffice.
        """
        entry = self._row(row)
        stop = entry.length + tokens
        self._take(entry, -(-stop // self.block_tokens) - len(entry.blocks))
        entry.length = stop

    def fork(self, parents: Sequence[int]) -> list[tuple[int, int]]:
        """Replace the rows: new row i holds what row parents[i] held, sharing its full blocks.

        Returns the block copies (src, dst) to make before the next write; no dst is a src. Rows
        that are nobody's parent are closed. Raises RequestError, and changes nothing, when the
        blocks do not suffice.
        """
        taken = [self._rows[parent] for parent in parents]
        rows = [entry and _Row(list(entry.blocks), entry.length) for entry in taken]
        owners = Counter(block for entry in rows if entry for block in entry.held())
        sharers = self._writable_sharers(rows)
        unused = [block for block in self._owners if block not in owners]
        self._require(len(sharers) - len(unused))
        self._free += unused
        self._owners, self._rows = owners, rows
        return [self._copy_last(row) for row in sharers]

    def reorder(self, parents: Sequence[int]) -> list[tuple[int, int]]:
        """`fork` that keeps the number of rows; a closed row is its own parent."""
        assert len(parents) == self.num_rows, (len(parents), self.num_rows)
        return self.fork(parents)

    def trim(self, row: int, first_position: int) -> None:
        """Free the blocks of `row` that lie wholly before `first_position`."""
        entry = self._row(row)
        assert first_position <= entry.length, (first_position, entry.length)
        for index in range(first_position // self.block_tokens - 1, -1, -1):
            block = entry.blocks[index]
            if block is None:
                break
            entry.blocks[index] = None
            self._drop(block)

    def release(self, rows: Iterable[int]) -> None:
        """Close `rows` and free what only they hold."""
        for row in rows:
            for block in self._row(row).held():
                self._drop(block)
            self._rows[row] = None
        while self._rows and self._rows[-1] is None:
            self._rows.pop()

    def _row(self, row: int) -> _Row:
        entry = self._rows[row]
        assert entry is not None, f"row {row} is closed"
        return entry

    def _writable_sharers(self, rows: list[_Row | None]) -> list[int]:
        """Rows whose last block has room and belongs to an earlier row too."""
        seen: set[int] = set()
        sharers = []
        for row, entry in enumerate(rows):
            if entry is None or entry.length % self.block_tokens == 0:
                continue
            last = entry.blocks[-1]
            if last in seen:
                sharers.append(row)
            seen.add(last)
        return sharers

    def _copy_last(self, row: int) -> tuple[int, int]:
        entry = self._row(row)
        shared, own = entry.blocks[-1], self._free.pop()
        self._owners[shared] -= 1
        self._owners[own] = 1
        entry.blocks[-1] = own
        return shared, own

    def _take(self, entry: _Row, blocks: int) -> None:
        if blocks <= 0:
            return
        if len(entry.blocks) + blocks > self.max_blocks_per_sequence:
            raise RequestError(
                f"a sequence outgrows the {self.max_blocks_per_sequence * self.block_tokens} "
                "positions that the cache has for each; shorten the prompt or the output, or build "
                "with a larger --max_input_len or --max_output_len"
            )
        self._require(blocks)
        for _ in range(blocks):
            block = self._free.pop()
            self._owners[block] = 1
            entry.blocks.append(block)

    def _require(self, blocks: int) -> None:
        if blocks > len(self._free):
            raise RequestError(
                f"the {self.num_blocks} cache blocks of {self.block_tokens} tokens do not suffice; "
                "run fewer or shorter sequences, or build with a larger --max_batch_size, "
                "--max_beam_width, --max_input_len or --max_output_len"
            )

    def _drop(self, block: int) -> None:
        self._owners[block] -= 1
        if not self._owners[block]:
            del self._owners[block]
            self._free.append(block)
