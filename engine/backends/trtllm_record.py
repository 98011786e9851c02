"""Recognises engine directories that trtllm-build wrote: their config.json as an EngineRecord.

Reads TensorRT-LLM's own layout since 0.8 (version, pretrained_config, build_config), and imports
nothing of the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import unified
from engine.engine_file import CONFIG_NAME, FileRecord
from engine.errors import EngineError, UserError
from engine.limits import BuildLimits
from engine.record import EngineRecord

NO_LAYOUT = 0


def find_foreign(folder: Path) -> Mapping[str, Any] | None:
    """The config.json of an engine that trtllm-build wrote; None where there is none, or ours,
    which has an 'engine' section."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return None
    is_theirs = isinstance(config, dict) and {"pretrained_config", "build_config"} <= config.keys()
    return config if is_theirs and "engine" not in config else None


def read_foreign(config: Mapping[str, Any], folder: Path) -> EngineRecord:
    """The record of `find_foreign`'s directory; EngineError if it is damaged."""
    path = folder / CONFIG_NAME
    model, build = config["pretrained_config"], config["build_config"]
    try:
        mapping = unified.read_mapping(model, str(path))
        return EngineRecord(
            config=unified.read_model(model, str(path)),
            dtype=model["dtype"],
            quant=unified.read_quant(model.get("quantization") or {}, str(path)),
            mapping=mapping,
            limits=_read_limits(build),
            layout_version=NO_LAYOUT,
            backend="tensorrt_llm",
            source=f"trtllm-build {config.get('version', '')}".strip(),
            files=tuple(_find_file(folder, rank) for rank in range(mapping.world)),
        )
    except UserError as error:
        raise EngineError(str(error)) from None
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise EngineError(
            f"{path}: is not a complete config.json of trtllm-build ({error!r}); build the engine "
            "again"
        ) from None


def _read_limits(build: Mapping[str, Any]) -> BuildLimits:
    """Until 0.10 there is a max_output_len, then a length of prompt and output together."""
    plugins = build.get("plugin_config") or {}
    input_len = build["max_input_len"]
    output_len = build.get("max_output_len")
    if output_len is None:
        output_len = max(build["max_seq_len"] - input_len, 1)
    return BuildLimits(
        max_batch_size=build["max_batch_size"],
        max_input_len=input_len,
        max_output_len=output_len,
        max_beam_width=build.get("max_beam_width", 1),
        max_num_tokens=build.get("max_num_tokens"),
        paged_kv_cache=bool(plugins.get("paged_kv_cache")),
        tokens_per_block=plugins.get("tokens_per_block") or BuildLimits.tokens_per_block,
        gather_all_token_logits=bool(build.get("gather_context_logits")),
    )


def _find_file(folder: Path, rank: int) -> FileRecord:
    path = folder / f"rank{rank}.engine"
    return FileRecord(path.name, path.stat().st_size, "")
