"""From run.py's flags to a RunPlan. Every refusal that needs no file is made here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.errors import UserError
from utils.generation import Decoding
from utils.output import OutputFiles
from utils.prompts import holds_ids

# Flags whose capability this version does not have, and what that is.
LATER = {
    "lora_dir": "LoRA",
    "lora_task_uids": "LoRA",
    "lora_ckpt_source": "LoRA",
    "prompt_table_path": "prompt tuning",
    "prompt_tasks": "prompt tuning",
    "num_prepend_vtokens": "prompt tuning",
}
# Flags of TensorRT-LLM's run-time variants; there is one run time here, so they change nothing.
MEANINGLESS = ("use_py_session", "debug_mode", "no_prompt_template")

_FILES = tuple(f.name for f in fields(OutputFiles))
CLASHES = (
    ("input_text", "input_file", "prompts come from one of them"),
    ("chat", "no_prompt_template", "a chat is the model's prompt template"),
    ("chat", "no_add_special_tokens", "the chat template places the special tokens"),
    ("interactive", "input_text", "an interactive run asks for its prompts"),
    ("interactive", "input_file", "an interactive run asks for its prompts"),
    ("interactive", "run_profiling", "an interactive run cannot be repeated"),
    *(("interactive", name, "an interactive run writes no files") for name in _FILES),
    ("streaming", "run_profiling", "a profile times whole runs"),
    ("streaming", "output_logits_npy", "a stream has no logits"),
)
# Flags whose files hold what beam search does not keep.
SINGLE_BEAM = ("output_logits_npy", "output_log_probs_npy")


@dataclass(frozen=True)
class TokenizerSource:
    """The flags that choose a tokenizer."""

    folder: str | None
    vocab_file: str | None
    tokenizer_type: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from, and how texts become ids."""

    texts: tuple[str, ...] | None
    file: str | None
    interactive: bool
    may_be_typed: bool  # ask for prompts if there is a terminal to ask at
    chat: bool
    system_prompt: str | None
    add_special_tokens: bool
    max_tokens: int | None


@dataclass(frozen=True)
class RunPlan:
    """What one call of run.py is to do; `remarks` are lines for its user's eyes."""

    engine_dir: str
    device: str | None
    max_attention_window: int | None
    tuning: bool
    may_share_gpu: bool
    max_output_len: int
    tokenizer: TokenizerSource
    prompts: PromptSource
    decoding: Decoding
    end_ids: tuple[int, ...] | None
    pad_id: int | None
    stop_words: tuple[tuple[str, ...], ...] | None
    bad_words: tuple[tuple[str, ...], ...] | None
    files: OutputFiles
    streaming_interval: int
    streaming: bool
    profiling: bool
    remarks: tuple[str, ...]


def plan_run(flags: Mapping[str, Any]) -> RunPlan:
    """The run that `flags` ask for; UserError for flags that contradict each other or ask for what
    this version does not have."""
    _refuse(flags)
    files = OutputFiles(**{name: flags[name] for name in _FILES})
    texts = flags["input_text"]
    decoding = Decoding.from_flags(flags)
    return RunPlan(
        engine_dir=flags["engine_dir"],
        device=None if flags["device"] == "auto" else flags["device"],
        max_attention_window=flags["max_attention_window_size"],
        tuning=not flags["no_tuning"],
        may_share_gpu=flags["oversubscribe_gpu"],
        max_output_len=flags["max_output_len"],
        tokenizer=TokenizerSource(
            folder=flags["tokenizer_dir"],
            vocab_file=flags["vocab_file"],
            tokenizer_type=flags["tokenizer_type"],
            trust_remote_code=flags["trust_remote_code"],
        ),
        prompts=PromptSource(
            texts=None if texts is None else tuple(texts),
            file=flags["input_file"],
            interactive=flags["interactive"],
            may_be_typed=not (texts or flags["input_file"] or files or flags["run_profiling"]),
            chat=flags["chat"],
            system_prompt=flags["system_prompt"],
            add_special_tokens=not flags["no_add_special_tokens"],
            max_tokens=flags["max_input_length"],
        ),
        decoding=decoding,
        end_ids=None if flags["end_id"] is None else tuple(flags["end_id"]),
        pad_id=flags["pad_id"],
        stop_words=_frozen(flags["stop_words"]),
        bad_words=_frozen(flags["bad_words"]),
        files=files,
        streaming_interval=flags["streaming_interval"],
        streaming=flags["streaming"],
        profiling=flags["run_profiling"],
        remarks=tuple(_remarks(flags, decoding)),
    )


def _remarks(flags: Mapping[str, Any], decoding: Decoding) -> Iterator[str]:
    ignored = [f"--{name}" for name in MEANINGLESS if flags[name]]
    if ignored:
        yield f"without meaning here and ignored: {', '.join(ignored)}"
    if decoding.idle_flags:
        idle = ", ".join(decoding.idle_flags)
        yield f"{idle} without effect while --top_k is 1; add --top_k 0"


def _frozen(lists: list[list[str]] | None) -> tuple[tuple[str, ...], ...] | None:
    return None if lists is None else tuple(map(tuple, lists))


def _refuse(flags: Mapping[str, Any]) -> None:
    for name, what in LATER.items():
        if flags[name] is not None:
            raise UserError(f"--{name}: {what} is not available in this version; leave it out")
    for one, other, why in CLASHES:
        if flags[one] and flags[other]:
            raise UserError(f"--{one} and --{other} cannot be combined: {why}")
    for name in SINGLE_BEAM:
        if flags[name] and flags["num_beams"] > 1:
            raise UserError(
                f"--{name} cannot be combined with --num_beams {flags['num_beams']}, since beam "
                "search does not keep it; use one beam"
            )
    if flags["system_prompt"] is not None and not flags["chat"]:
        raise UserError("--system_prompt is a part of a chat; add --chat or leave it out")
    if flags["chat"] and flags["input_file"] and holds_ids(flags["input_file"]):
        raise UserError(
            f"--chat needs text and --input_file {flags['input_file']} holds token ids; give a "
            ".txt file or leave --chat out"
        )
    if not Path(flags["engine_dir"]).is_dir():
        raise UserError(
            f"--engine_dir {flags['engine_dir']} does not exist; build an engine with build.py "
            "--output_dir, or name one that is there"
        )
