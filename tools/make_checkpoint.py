"""Write a Hugging Face checkpoint of Yi's dimensions with random weights.

    python tools/make_checkpoint.py --preset yi-6b --out DIR [--layers N] [--seed N]

It serves speed and memory tests: the weights can be moved and multiplied, and say nothing. One
block of normal numbers (deviation 0.02) is drawn per seed and every matrix is read out of it as
an endless loop, from a starting point that depends on the tensor's name. The block's length is a
prime, so no row of a matrix repeats another; but the tensors are shifted copies of the same
numbers, not independent draws. That makes writing as fast as the disk. Norm weights are ones.

Memory stays at a few times the block, whatever the size of the model. Format of the files:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.errors import UserError  # noqa: E402

BLOCK_ELEMENTS = 8_388_593  # the largest prime below 2**23: 16 MiB of bfloat16
DEVIATION = 0.02
DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": DEVIATION,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 64000,
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
PRESETS = {
    "yi-6b": COMMON | dict(zip(SIZES, (4096, 11008, 32, 32, 4), strict=True)),
    "yi-9b": COMMON | dict(zip(SIZES, (4096, 11008, 48, 32, 4), strict=True)),
    "yi-34b": COMMON | dict(zip(SIZES, (7168, 20480, 60, 56, 8), strict=True)),
    "tiny": COMMON | dict(zip(SIZES, (256, 768, 6, 4, 2), strict=True)) | {"vocab_size": 4096},
}
UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; one-dimensional ones are norm weights."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What will be written, fixed before the first byte is."""

    config: dict
    dtype: str
    seed: int
    shards: dict[str, list[Tensor]]  # file name -> its tensors, in order

    @property
    def tensor_bytes(self) -> int:
        size = DTYPES[self.dtype][0].itemsize
        return size * sum(t.elements for tensors in self.shards.values() for t in tensors)


class Noise:
    """The block of normal numbers as bytes, read as a loop."""

    def __init__(self, seed: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(seed)
        block = torch.empty(BLOCK_ELEMENTS).normal_(0, DEVIATION, generator=generator)
        self._bytes = memoryview(block.to(dtype).view(torch.uint8).numpy())
        self._itemsize = dtype.itemsize

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """Yield the tensor's bytes in pieces of at most one block."""
        position = zlib.crc32(tensor.name.encode()) % BLOCK_ELEMENTS * self._itemsize
        left = tensor.elements * self._itemsize
        while left:
            piece = self._bytes[position : position + left]
            yield piece
            left -= len(piece)
            position = 0


def model_tensors(config: dict) -> Iterator[Tensor]:
    """Every tensor of a Llama checkpoint with this config, in the order of its layers."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        for stem, shape in block.items():
            yield Tensor(f"model.layers.{layer}.{stem}.weight", shape)
    yield Tensor("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield Tensor("lm_head.weight", (config["vocab_size"], hidden))


def split_shards(tensors: Iterator[Tensor], itemsize: int, limit: int) -> dict[str, list[Tensor]]:
    """Fill files up to ``limit`` bytes each; a tensor larger than that has a file of its own."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.elements * itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": g for i, g in enumerate(groups, 1)}


def write_shard(file: BinaryIO, tensors: list[Tensor], dtype: str, noise: Noise) -> None:
    """Write one safetensors container: header length, header, then the tensors without gaps."""
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.elements * torch_dtype.itemsize
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        if len(tensor.shape) == 1:
            ones = torch.ones(tensor.shape, dtype=torch_dtype)
            file.write(ones.view(torch.uint8).numpy())
        else:
            for piece in noise.pieces(tensor):
                file.write(piece)


def write_checkpoint(plan: Plan, out: Path) -> list[Path]:
    """Write all files under temporary names and rename them at the end, config.json last."""
    out.mkdir(parents=True, exist_ok=True)
    noise = Noise(plan.seed, DTYPES[plan.dtype][0])
    unfinished: dict[Path, Path] = {}

    def temporary(name: str) -> Path:
        path = out / f"{name}.tmp-{os.getpid()}"
        unfinished[path] = out / name
        return path

    try:
        for name, tensors in plan.shards.items():
            with temporary(name).open("wb") as file:
                write_shard(file, tensors, plan.dtype, noise)
        for name, content in small_files(plan).items():
            temporary(name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path, final in unfinished.items():
            path.rename(final)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return list(unfinished.values())


def small_files(plan: Plan) -> dict[str, dict]:
    """The JSON files by name, in the order in which they appear."""
    files: dict[str, dict] = {}
    if len(plan.shards) > 1:
        files["model.safetensors.index.json"] = {
            "metadata": {"total_size": plan.tensor_bytes},
            "weight_map": {t.name: name for name, ts in plan.shards.items() for t in ts},
        }
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    files["generation_config.json"] = {key: plan.config[key] for key in ids}
    files["config.json"] = dict(sorted((plan.config | {"torch_dtype": plan.dtype}).items()))
    return files


def parse_size(text: str) -> int:
    """Bytes in '4GB' (10**9) or '4GiB' (2**30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", text)
    if not match or match.group(2) not in UNITS or float(match.group(1)) == 0:
        raise UserError(f"--shard-size {text} is not a size; write a number with a unit, as in 4GB")
    return int(float(match.group(1)) * UNITS[match.group(2)])


def override(config: dict, settings: list[str]) -> dict:
    """A copy of the config with 'key=value' settings applied; the value is JSON or a word."""
    config = dict(config)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in config | {"head_dim": None}:
            raise UserError(
                f"--config {setting} does not set a known key; write key=value with "
                f"one of {', '.join(sorted(config))}, head_dim"
            )
        try:
            config[key] = json.loads(text)
        except json.JSONDecodeError:
            config[key] = text
    return config


def check_config(config: dict) -> None:
    """Refuse dimensions that make no Llama model."""
    for key in (*SIZES, "vocab_size"):
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(f"--config {key} is {config[key]!r}; choose a whole number from 1")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads:
        raise UserError(
            f"num_key_value_heads {kv_heads} does not divide num_attention_heads "
            f"{heads}; choose a divisor"
        )
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise UserError(
            f"num_attention_heads {heads} does not divide hidden_size "
            f"{config['hidden_size']}; choose a divisor or set head_dim"
        )


def check_room(out: Path, needed: int) -> None:
    """Refuse a folder that is in use or on a disk that is too full, before anything is written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; name a new one or empty it")
    existing = next(p for p in (out, *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"--out {out} has {free / 1e9:.1f} GB of free disk space and "
            f"{needed / 1e9:.1f} GB are needed; choose another disk or fewer --layers"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", required=True, choices=PRESETS, help="dimensions to use")
    parser.add_argument("--out", required=True, type=Path, help="new or empty folder")
    parser.add_argument("--layers", type=int, help="number of layers; default: the preset's")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="type of every tensor")
    parser.add_argument("--shard-size", default="4GB", help="largest file, e.g. 500MB or 4GiB")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument(
        "--config",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings of config.json that differ from the preset's",
    )
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    config = override(PRESETS[args.preset], args.config)
    if args.layers is not None:
        if args.layers < 1:
            raise UserError(f"--layers is {args.layers}; choose a whole number from 1")
        config["num_hidden_layers"] = args.layers
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; choose a whole number from 0 to 2**63 - 1")
    check_config(config)
    itemsize = DTYPES[args.dtype][0].itemsize
    shards = split_shards(model_tensors(config), itemsize, parse_size(args.shard_size))
    return Plan(config, args.dtype, args.seed, shards)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        plan = make_plan(args)
        check_room(args.out, plan.tensor_bytes + 2**20)
        start = time.perf_counter()
        paths = write_checkpoint(plan, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: --out {args.out} cannot be written: {error.strerror}; choose another folder",
            file=sys.stderr,
        )
        return 2
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        print(f"{size:>15,} bytes  {path}")
    print(
        f"{sum(sizes):,} bytes in {len(paths)} files, {time.perf_counter() - start:.1f} seconds; "
        "random weights, no tokenizer"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
