"""A GGUF file of a Yi shape with random weights, for llama.cpp.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks of the quantised types:
ggml-common.h. Codes are random bytes and scales are constant, so that writing is as fast as the
disk; the arithmetic is that of any weights.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.config import ModelConfig

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, FLOAT32, STRING = 4, 6, 8
# Deviation of the weights: scales are this over the deviation of the codes.
SPREAD = 0.02
# Random blocks, which all tensors repeat.
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Storage:
    """A ggml type: its number, weights of a block and bytes of a block."""

    number: int
    weights: int
    bytes: int


F32, F16, BF16 = Storage(0, 1, 4), Storage(1, 1, 2), Storage(30, 1, 2)
Q4_0, Q8_0, Q6_K = Storage(2, 32, 18), Storage(8, 32, 34), Storage(14, 256, 210)
# General file type of the header, storage of the layers, and of the output head as llama-quantize
# chooses it.
FILE_TYPES = {
    "F32": (0, F32, F32),
    "F16": (1, F16, F16),
    "BF16": (32, BF16, BF16),
    "Q8_0": (7, Q8_0, Q8_0),
    "Q4_0": (2, Q4_0, Q6_K),
}


@dataclass(frozen=True)
class Entry:
    """A tensor: `shape` outermost first; one-dimensional ones are norms, all ones."""

    name: str
    shape: tuple[int, ...]
    storage: Storage

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) // self.storage.weights * self.storage.bytes


def write_gguf(path: Path, config: ModelConfig, file_type: str, seed: int = 0) -> None:
    entries = list(_entries(config, file_type))
    with open(path, "wb") as file:
        _write_header(file, config, FILE_TYPES[file_type][0], entries)
        source = np.random.default_rng(seed)
        chunks = {
            storage: random_blocks(storage, CHUNK_BYTES // storage.bytes, source).tobytes()
            for storage in {entry.storage for entry in entries if len(entry.shape) > 1}
        }
        for entry in entries:
            _pad(file)
            _write_tensor(file, entry, chunks)
        _pad(file)


def random_blocks(storage: Storage, count: int, source: np.random.Generator) -> np.ndarray:
    """uint8 [count, bytes of a block]: weights of mean 0 (Q4_0 and Q6_K nearly) and deviation
    0.02."""
    if storage.weights == 1:
        values = source.normal(0.0, SPREAD, count).astype(np.float32)
        if storage is BF16:
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(count, -1)
        kind = "<f4" if storage is F32 else "<f2"
        return values.astype(kind).view(np.uint8).reshape(count, -1)
    blocks = source.integers(0, 256, (count, storage.bytes), dtype=np.uint8)
    if storage is Q6_K:
        # 192 bytes of codes -32…31, 16 int8 scales and the scale of these.
        blocks[:, 192:208] = 1
        blocks[:, 208:] = _half(SPREAD / 18.5)
        return blocks
    # The scale comes first; codes are -8…7 or -128…127.
    blocks[:, :2] = _half(SPREAD / (4.6 if storage is Q4_0 else 74.0))
    return blocks


def _entries(config: ModelConfig, file_type: str) -> Iterator[Entry]:
    _, layer, head = FILE_TYPES[file_type]
    width, ffn = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = {
        "attn_norm": (width,),
        "attn_q": (q_rows, width),
        "attn_k": (kv_rows, width),
        "attn_v": (kv_rows, width),
        "attn_output": (width, q_rows),
        "ffn_norm": (width,),
        "ffn_gate": (ffn, width),
        "ffn_up": (ffn, width),
        "ffn_down": (width, ffn),
    }
    yield Entry("token_embd.weight", (config.vocab_size, width), layer)
    for index in range(config.num_layers):
        for name, shape in block.items():
            storage = F32 if len(shape) == 1 else layer
            yield Entry(f"blk.{index}.{name}.weight", shape, storage)
    yield Entry("output_norm.weight", (width,), F32)
    yield Entry("output.weight", (config.vocab_size, width), head)


def _write_header(
    file: BinaryIO, config: ModelConfig, type_number: int, entries: list[Entry]
) -> None:
    values: dict[str, int | float | str] = {
        "general.architecture": "llama",
        "general.file_type": type_number,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "tokenizer.ggml.model": "no_vocab",
    }
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(values)))
    for key, value in values.items():
        file.write(_string(key) + _value(value))
    offset = 0
    for entry in entries:
        # Dimensions are innermost first.
        dims = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        file.write(_string(entry.name) + dims + struct.pack("<IQ", entry.storage.number, offset))
        offset += entry.bytes + -entry.bytes % ALIGNMENT


def _write_tensor(file: BinaryIO, entry: Entry, chunks: Mapping[Storage, bytes]) -> None:
    if len(entry.shape) == 1:
        file.write(np.ones(entry.shape, "<f4").tobytes())
        return
    left = entry.bytes
    while left:
        piece = chunks[entry.storage][:left]
        file.write(piece)
        left -= len(piece)


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    return struct.pack("<II", UINT32, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _half(value: float) -> np.ndarray:
    return np.array([value], "<f2").view(np.uint8)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
