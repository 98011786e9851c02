"""Stands in for trtllm-build: reads its flags and the checkpoint as the real one would, and writes
a directory of the real one's layout with empty engines.

It refuses unknown flags, and tensors that are missing or too many, as TensorRT-LLM 0.8 does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BLOCK = (
    "input_layernorm",
    "post_layernorm",
    "attention.qkv",
    "attention.dense",
    "mlp.fc",
    "mlp.gate",
    "mlp.proj",
)


def parse(help_text: str) -> argparse.Namespace:
    """The arguments, by the flags that the help text lists."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    seen = set()
    for line in help_text.splitlines():
        words = line.split()
        if not words or not words[0].startswith("--") or words[0] in seen:
            continue
        seen.add(words[0])
        takes_value = len(words) > 1 and (words[1][0] == "{" or words[1].isupper())
        if not takes_value:
            parser.add_argument(words[0], action="store_true")
        elif words[1][0] == "{":
            parser.add_argument(words[0], choices=words[1].strip("{}").split(","))
        else:
            parser.add_argument(words[0])
    return parser.parse_args()


def read_header(path: Path) -> dict[str, dict]:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    return header


def expected_names(config: dict, rank: int) -> set[str]:
    mapping = config["mapping"]
    stage, last = rank // mapping["tp_size"], mapping["pp_size"] - 1
    layers = config["num_hidden_layers"] // mapping["pp_size"]
    names = {f"transformer.layers.{i}.{name}.weight" for i in range(layers) for name in BLOCK}
    names |= {"transformer.vocab_embedding.weight"} if stage == 0 else set()
    return names | ({"lm_head.weight", "transformer.ln_f.weight"} if stage == last else set())


def main(help_text: str) -> None:
    if sys.argv[1:] == ["--help"]:
        print(help_text)
        return
    args = parse(help_text)
    checkpoint, output = Path(args.checkpoint_dir), Path(args.output_dir)
    config = json.loads((checkpoint / "config.json").read_text())
    for rank in range(config["mapping"]["world_size"]):
        found = set(read_header(checkpoint / f"rank{rank}.safetensors"))
        if found != expected_names(config, rank):
            sys.exit(f"tensor names differ: {sorted(found ^ expected_names(config, rank))}")
    output.mkdir(exist_ok=True)
    for rank in range(config["mapping"]["world_size"]):
        (output / f"rank{rank}.engine").write_bytes(b"plan")
        print(f"[TRT-LLM] rank {rank} built", flush=True)
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}
    build_config = {name: int(v) for name, v in given.items() if name.startswith("max_")}
    written = {"version": "stand-in", "pretrained_config": config, "build_config": build_config}
    (output / "config.json").write_text(json.dumps(written))
    (output / "given.json").write_text(json.dumps(given))
