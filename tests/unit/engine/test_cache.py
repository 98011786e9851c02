from __future__ import annotations

import random

import pytest
import torch

from engine.cache import CODE_DTYPES, BlockTables, KVCache
from engine.errors import RequestError


def make_cache(**changes) -> KVCache:
    sizes = {"layers": 3, "kv_heads": 2, "head_dim": 4, "num_blocks": 5, "block_tokens": 6}
    return KVCache(**sizes | {"dtype": torch.float32, "device": "cpu"} | changes)


def make_code_cache(dtype: torch.dtype) -> KVCache:
    return make_cache(dtype=dtype, scales=torch.arange(12.0).view(3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_are_views_of_one_allocation(dtype: torch.dtype) -> None:
    cache = make_cache(dtype=dtype)
    assert all(cache.layer(slot)[2:] == (None, None) for slot in range(3))
    assert (cache.num_blocks, cache.block_tokens) == (5, 6)
    assert cache.nbytes == 3 * 2 * 5 * 2 * 6 * 4 * dtype.itemsize
    parts = [part for slot in range(3) for part in cache.layer(slot)[:2]]
    for number, part in enumerate(parts):
        assert part.shape == (5, 2, 6, 4) and part.dtype == dtype
        part.fill_(number)
    assert [part.unique().tolist() for part in parts] == [[n] for n in range(6)]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_a_sequence_in_one_block_is_a_view_per_head_of_contiguous_rows() -> None:
    k_GSD = make_cache().layer(0).k[3][:, :5]
    assert k_GSD.shape == (2, 5, 4) and k_GSD[0].is_contiguous()


@pytest.mark.parametrize("dtype", CODE_DTYPES.values(), ids=str)
def test_codes_take_a_byte_each_and_have_their_layers_scales(dtype: torch.dtype) -> None:
    cache = make_code_cache(dtype)
    assert cache.nbytes * 2 == make_cache(dtype=torch.bfloat16).nbytes
    k, v, k_scale_G, v_scale_G = cache.layer(1)
    assert k.dtype == v.dtype == dtype
    assert (k_scale_G.tolist(), v_scale_G.tolist()) == ([4.0, 5.0], [6.0, 7.0])


def test_codes_and_scales_come_together() -> None:
    with pytest.raises(AssertionError, match="no cache of torch.int8 without scales"):
        make_cache(dtype=torch.int8)
    with pytest.raises(AssertionError, match="no cache of torch.float16 with scales"):
        make_code_cache(torch.float16)


@pytest.mark.parametrize("dtype", [None, *CODE_DTYPES.values()], ids=str)
@pytest.mark.parametrize("tokens", [None, 2])
def test_copy_blocks_copies_all_layers_at_once(
    tokens: int | None, dtype: torch.dtype | None
) -> None:
    cache = make_cache() if dtype is None else make_code_cache(dtype)
    for slot in range(3):
        for part in cache.layer(slot)[:2]:
            values = torch.randn(part.shape, generator=torch.Generator().manual_seed(slot))
            part.copy_(values * 40)
    before = [tuple(part.clone() for part in cache.layer(slot)[:2]) for slot in range(3)]
    # A cycle: the copies do not see one another.
    cache.copy_blocks([(0, 1), (1, 0), (2, 4)], tokens)
    for slot in range(3):
        for old, new in zip(before[slot], cache.layer(slot)[:2], strict=True):
            expected = old.clone()
            for source, target in ((0, 1), (1, 0), (2, 4)):
                expected[target, :, :tokens] = old[source, :, :tokens]
            assert torch.equal(new.float(), expected.float())


def test_copying_nothing_is_allowed() -> None:
    make_cache().copy_blocks([])


def append_slots(tables: BlockTables, row: int, count: int) -> list[int]:
    """The slots (block * block_tokens + offset) that the table gives `count` new positions."""
    start = tables.length(row)
    tables.append(row, count)
    blocks = tables.table([row])[0].tolist()
    places = (divmod(start + i, tables.block_tokens) for i in range(count))
    return [blocks[index] * tables.block_tokens + offset for index, offset in places]


def test_append_reserves_blocks_as_a_sequence_grows() -> None:
    tables = BlockTables(6, 4, 3)
    assert tables.open(2) == [0, 1]
    assert append_slots(tables, 0, 3) == [0, 1, 2]
    assert append_slots(tables, 1, 5) == [4, 5, 6, 7, 8]
    assert append_slots(tables, 0, 1) == [3]
    assert append_slots(tables, 0, 2) == [12, 13]
    assert append_slots(tables, 0, 0) == []
    assert [tables.length(row) for row in (0, 1)] == [6, 5]
    assert tables.table().tolist() == [[0, 3, 0], [1, 2, 0]]
    assert tables.table().dtype == torch.int32
    assert tables.table([1]).tolist() == [[1, 2, 0]]
    assert tables.free_blocks == 2


def test_a_contiguous_cache_is_one_block_per_sequence() -> None:
    tables = BlockTables(4, 100, 1)
    tables.open(2)
    tables.append(0, 60)
    tables.append(1, 40)
    assert tables.fork([0, 0, 1, 1]) == [(0, 2), (1, 3)]
    assert tables.table().tolist() == [[0], [2], [1], [3]]
    # Both beams of the first prompt go on from its second, those of the other change places.
    assert tables.reorder([1, 1, 3, 2]) == [(2, 0)]
    assert tables.table().tolist() == [[2], [0], [3], [1]]
    assert append_slots(tables, 1, 1) == [60]
    assert append_slots(tables, 2, 1) == [340]


def test_full_blocks_are_shared_and_never_copied() -> None:
    tables = BlockTables(8, 4, 4)
    tables.open(1)
    tables.append(0, 8)
    assert tables.fork([0, 0, 0]) == []
    assert tables.free_blocks == 6
    for row in range(3):
        tables.append(row, 1)
    assert tables.table().tolist() == [[0, 1, 2, 0], [0, 1, 3, 0], [0, 1, 4, 0]]
    tables.release([0, 2])
    assert tables.table([0, 1]).tolist() == [[0] * 4, [0, 1, 3, 0]]
    assert tables.free_blocks == 5
    tables.release([1])
    assert (tables.num_rows, tables.free_blocks) == (0, 8)


def test_closed_rows_are_reused_before_new_ones() -> None:
    tables = BlockTables(8, 4, 2)
    tables.open(4)
    tables.release([1, 3])
    assert tables.num_rows == 3
    tables.release([0])
    assert tables.open(1) == [0]
    assert tables.open(2) == [1, 3]
    assert [tables.length(row) for row in range(4)] == [0] * 4


@pytest.mark.parametrize(
    "first_position, kept",
    [(-3, [0, 1, 2]), (0, [0, 1, 2]), (3, [0, 1, 2]), (4, [1, 2]), (9, [2])],
)
def test_trim_frees_whole_blocks_before_the_window(first_position: int, kept: list[int]) -> None:
    tables = BlockTables(3, 4, 3)
    tables.open(1)
    tables.append(0, 9)
    tables.trim(0, first_position)
    tables.trim(0, first_position)
    assert tables.free_blocks == 3 - len(kept)
    assert tables.table().tolist() == [[index if index in kept else 0 for index in range(3)]]
    assert append_slots(tables, 0, 1) == [9]


def test_trimming_one_sharer_keeps_the_block_of_the_other() -> None:
    tables = BlockTables(4, 2, 3)
    tables.open(1)
    tables.append(0, 4)
    tables.fork([0, 0])
    tables.trim(0, 4)
    assert tables.free_blocks == 2
    assert tables.table().tolist() == [[0, 0, 0], [0, 1, 0]]
    tables.release([1])
    assert tables.free_blocks == 4


def test_a_sequence_that_outgrows_its_table_row_is_refused() -> None:
    tables = BlockTables(9, 4, 2)
    tables.open(1)
    tables.append(0, 7)
    with pytest.raises(RequestError) as error:
        tables.append(0, 2)
    assert str(error.value) == (
        "a sequence outgrows the 8 positions that the cache has for each; shorten the prompt or "
        "the output, or build with a larger --max_input_len or --max_output_len"
    )
    assert (tables.length(0), tables.free_blocks) == (7, 7)


OUT_OF_BLOCKS = (
    "the 3 cache blocks of 4 tokens do not suffice; run fewer or shorter sequences, or build with "
    "a larger --max_batch_size, --max_beam_width, --max_input_len or --max_output_len"
)


def test_running_out_of_blocks_is_refused_and_changes_nothing() -> None:
    tables = BlockTables(3, 4, 3)
    tables.open(2)
    tables.append(0, 6)
    with pytest.raises(RequestError) as error:
        tables.append(1, 5)
    assert str(error.value) == OUT_OF_BLOCKS
    with pytest.raises(RequestError) as error:
        tables.fork([0, 0, 0])
    assert str(error.value) == OUT_OF_BLOCKS
    assert tables.table().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert (tables.num_rows, tables.free_blocks) == (2, 1)


class Walk:
    """Random operations on the tables, mirrored by lists of the tokens each row should hold."""

    def __init__(self, seed: int, num_blocks: int, block_tokens: int, max_blocks: int):
        self.rng = random.Random(seed)
        self.tables = BlockTables(num_blocks, block_tokens, max_blocks)
        self.memory = torch.full((num_blocks, block_tokens), -1)
        self.rows: dict[int, list[int]] = {}
        self.trimmed: dict[int, int] = {}
        self.next_token = 0
        self.refusals = 0

    def open(self) -> None:
        for row in self.tables.open(self.rng.randint(1, 3)):
            assert row not in self.rows
            self.rows[row], self.trimmed[row] = [], 0

    def append(self) -> None:
        row, count = self.pick(), self.rng.choice((0, 1, 1, 1, 2, 5, 11))
        slots = append_slots(self.tables, row, count)
        assert len(slots) == count
        for slot in slots:
            self.memory.view(-1)[slot] = self.next_token
            self.rows[row].append(self.next_token)
            self.next_token += 1

    def fork(self) -> None:
        self.take_parents([self.pick() for _ in range(self.rng.randint(1, 8))], self.tables.fork)

    def reorder(self) -> None:
        parents = [self.pick() if row in self.rows else row for row in range(self.tables.num_rows)]
        self.take_parents(parents, self.tables.reorder)

    def take_parents(self, parents, operation) -> None:
        copies = operation(parents)
        assert not {source for source, _ in copies} & {target for _, target in copies}
        for source, target in copies:
            self.memory[target] = self.memory[source]
        taken = {row: parent for row, parent in enumerate(parents) if parent in self.rows}
        self.trimmed = {row: self.trimmed[parent] for row, parent in taken.items()}
        self.rows = {row: list(self.rows[parent]) for row, parent in taken.items()}

    def trim(self) -> None:
        row = self.pick()
        position = self.rng.randint(0, len(self.rows[row]))
        self.tables.trim(row, position)
        self.trimmed[row] = max(self.trimmed[row], position)

    def release(self) -> None:
        rows = self.rng.sample(sorted(self.rows), self.rng.randint(1, len(self.rows)))
        self.tables.release(rows)
        for row in rows:
            del self.rows[row]

    def pick(self) -> int:
        return self.rng.choice(sorted(self.rows))

    def step(self) -> None:
        actions = [self.append] * 8 + [self.reorder] * 2 + [self.fork, self.trim, self.release]
        action = self.open if not self.rows else self.rng.choice([*actions, self.open])
        try:
            action()
        except RequestError:
            self.refusals += 1
            self.release()

    def check(self) -> None:
        tables, size = self.tables, self.tables.block_tokens
        table = tables.table()
        held = set()
        for row in range(tables.num_rows):
            tokens = self.rows.get(row, [])
            blocks = table[row].tolist()
            first = self.trimmed[row] if row in self.rows else 0
            for position in range(first, len(tokens)):
                place = divmod(position, size)
                assert self.memory[blocks[place[0]], place[1]] == tokens[position]
            used = range(first // size, -(-len(tokens) // size))
            held |= {blocks[index] for index in used}
            assert all(block == 0 for index, block in enumerate(blocks) if index not in used)
        assert tables.free_blocks == tables.num_blocks - len(held)


@pytest.mark.parametrize("block_tokens, max_blocks", [(1, 40), (4, 10), (16, 3), (40, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_random_walk(seed: int, block_tokens: int, max_blocks: int) -> None:
    walk = Walk(seed, num_blocks=max_blocks * 6, block_tokens=block_tokens, max_blocks=max_blocks)
    for _ in range(300):
        walk.step()
        walk.check()
    assert walk.refusals and walk.next_token > 100
    walk.tables.release(sorted(walk.rows))
    assert walk.tables.free_blocks == walk.tables.num_blocks
