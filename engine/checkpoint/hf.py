"""Hugging Face directories: config.json and safetensors or pytorch_model.bin files.

Reads tensors only; code that lies in such a directory is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from engine.checkpoint.base import Checkpoint, TensorSource
from engine.checkpoint.files import read_json
from engine.checkpoint.quantised import QuantisedCheckpoint
from engine.checkpoint.quantised_hf import CONFIG_FILE, read_linear_format
from engine.checkpoint.shards import check_index, find_shards, merge_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError

GENERATION_FILE = "generation_config.json"

# The first repositories of Yi called the two norms of a block by their place in it.
YI_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
YI_NORM = re.compile(r"^(model\.layers\.\d+\.)(ln1|ln2)(\.weight)$")

# Rotary tables that older transformers saved; the config's rope fields give them anew.
NOT_NEEDED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

QUANTISED_TENSOR = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_zero_point|weight_scale\w*"
    r"|input_scale|pre_quant_scale|k_scale|v_scale|SCB|absmax|quant_map|quant_state\.\w+)$"
)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING_DEFAULTS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "num_beams",
    "max_new_tokens",
)


def open_hf(folder: Path) -> Checkpoint:
    """Open a directory of a full-precision or a quantised model.

    Raises CheckpointError for damaged or missing files, foreign features and quantisations that
    the engine does not have.
    """
    raw = read_json(folder / CONFIG_FILE)
    config = ModelConfig.from_hf(raw, where=str(folder / CONFIG_FILE))
    linear_format = read_linear_format(folder, raw, config)
    generation = read_generation(folder, raw)
    shards = find_shards(folder)
    with ExitStack() as stack:
        files = {path: stack.enter_context(closing(shards.reader(path))) for path in shards.paths}
        found = merge_tensors(files)
        check_index(shards, found)
        if linear_format is None:
            refuse_undeclared(folder, found)
            make = Checkpoint
        else:
            make = partial(QuantisedCheckpoint, linear_format=linear_format)
        return make(
            str(folder),
            config,
            canonical_sources(found),
            generation=generation,
            dropped=tuple(name for name in found if NOT_NEEDED.search(name)),
            resources=stack.pop_all(),
        )


def canonical_sources(found: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Sources by canonical name, without those that are not needed; unknown names stay."""
    sources: dict[str, TensorSource] = {}
    for name, source in found.items():
        if NOT_NEEDED.search(name):
            continue
        canonical = YI_NORM.sub(lambda match: match[1] + YI_NORMS[match[2]] + match[3], name)
        if canonical in sources:
            raise CheckpointError(
                f"{source.origin}: tensors {name!r} and {sources[canonical].name!r} are the same "
                "weight of the network; remove the one that does not belong to the checkpoint"
            )
        sources[canonical] = source
    return sources


def refuse_undeclared(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for quantised weights that no settings file describes."""
    for name in names:
        if QUANTISED_TENSOR.search(name):
            raise CheckpointError(
                f"{folder}: the weights are already quantised, as tensor {name} shows, but "
                f"{CONFIG_FILE} has no quantization_config; download the checkpoint again with all "
                "its .json files, or name the full-precision one"
            )


def read_generation(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids and sampling defaults; generation_config.json wins over config.json."""
    path = folder / GENERATION_FILE
    own = read_json(path) if path.exists() else {}
    values = {key: raw[key] for key in TOKEN_IDS if raw.get(key) is not None}
    wanted = (*TOKEN_IDS, *SAMPLING_DEFAULTS)
    values |= {key: own[key] for key in wanted if own.get(key) is not None}
    for key in TOKEN_IDS:
        if key in values and not _is_token_ids(values[key]):
            file = path if own.get(key) is not None else folder / CONFIG_FILE
            raise CheckpointError(
                f"{file}: {key} {values[key]!r} is neither a token id nor a list of them; "
                "correct the file"
            )
    return values


def _is_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(type(number) is int for number in ids)
