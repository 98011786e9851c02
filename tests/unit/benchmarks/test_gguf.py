"""GGUF files against the format's description, read by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from benchmarks.peering.gguf import BF16, FILE_TYPES, Q4_0, Q6_K, Q8_0, random_blocks, write_gguf
from engine.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
)
# Bytes of a block and its weights, from ggml's table of types.
TABLE = {0: (4, 1), 1: (2, 1), 2: (18, 32), 8: (34, 32), 14: (210, 256), 30: (2, 1)}


class Reader:
    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, kind: str):
        [value] = struct.unpack_from("<" + kind, self.data, self.place)
        self.place += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        length = self.take("Q")
        self.place += length
        return self.data[self.place - length : self.place].decode()

    def value(self):
        kind = self.take("I")
        return self.text() if kind == 8 else self.take({4: "I", 6: "f"}[kind])


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_a_file_is_what_its_header_says(tmp_path, kind):
    path = tmp_path / "small.gguf"
    write_gguf(path, SMALL, kind)
    reader = Reader(path.read_bytes())
    assert reader.data[:4] == b"GGUF"
    reader.place = 4
    assert reader.take("I") == 3
    num_tensors, num_values = reader.take("Q"), reader.take("Q")
    values = {reader.text(): reader.value() for _ in range(num_values)}
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 5e6
    tensors = {}
    for _ in range(num_tensors):
        name = reader.text()
        dims = [reader.take("Q") for _ in range(reader.take("I"))]
        tensors[name] = (dims, reader.take("I"), reader.take("Q"))
    assert num_tensors == 3 + 2 * 9
    assert tensors["blk.1.ffn_down.weight"][0] == [512, 256]
    start = reader.place + -reader.place % 32
    end = 0
    for dims, number, offset in tensors.values():
        size, weights = TABLE[number]
        assert offset == end + -end % 32, "tensors follow each other, aligned"
        end = offset + int(np.prod(dims)) // weights * size
    assert len(reader.data) == start + end + -end % 32
    norm = start + tensors["output_norm.weight"][2]
    assert np.frombuffer(reader.data, "<f4", 256, norm).tolist() == [1.0] * 256


def scales(blocks, first):
    return blocks[:, first : first + 2].copy().view("<f2").astype(np.float32)


def read_q4_0(blocks):
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).astype(np.float32)
    return (codes - 8) * scales(blocks, 0)


def read_q8_0(blocks):
    return blocks[:, 2:].copy().view(np.int8) * scales(blocks, 0)


def read_q6_k(blocks):
    """Codes of 6 bits, in some order: 4 low ones of a byte's half, 2 high ones of a quarter."""
    low = np.concatenate([blocks[:, :128] & 15, blocks[:, :128] >> 4], 1)
    high = np.concatenate([blocks[:, 128:192] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    codes = (low | high << 4).astype(np.float32) - 32
    assert (blocks[:, 192:208].view(np.int8) == 1).all()
    return codes * scales(blocks, 208)


def read_bf16(blocks):
    return (blocks.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("storage", "read"),
    [(Q4_0, read_q4_0), (Q8_0, read_q8_0), (Q6_K, read_q6_k), (BF16, read_bf16)],
)
def test_weights_are_about_as_large_as_those_of_our_engines(storage, read):
    weights = read(random_blocks(storage, 4000, np.random.default_rng(1)))
    assert abs(weights.mean()) < 0.003
    assert abs(weights.std() - 0.02) < 0.001
