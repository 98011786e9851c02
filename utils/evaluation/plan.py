"""From summarize.py's flags to an EvaluationPlan. Every refusal that needs no file's content is
made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine import env
from engine.errors import UserError
from utils.generation import Decoding
from utils.run_plan import TokenizerSource

TASKS = ("summarize", "generate", "ppl")
# Spellings of --data_type.
DATA_TYPES = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}
# Flags of TensorRT-LLM's run-time variants; there is one run time here, so they change nothing.
MEANINGLESS = ("use_py_session", "debug_mode")
# Penalties that transformers does not have.
ENGINE_ONLY = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class HfSource:
    """The flags of transformers' side."""

    folder: str
    dtype: str
    device_map_auto: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class DataSource:
    """The flags that choose texts, and how they become prompts."""

    path: str | None
    articles: int
    ppl_file: str | None
    max_input_length: int
    add_special_tokens: bool


@dataclass(frozen=True)
class Checks:
    """Limits that set the exit status, in points of ROUGE; for perplexity `parity` is per cent."""

    rouge1: float | None
    parity: float | None


@dataclass(frozen=True)
class EvaluationPlan:
    """What one call of summarize.py is to do; `remarks` are lines for its user's eyes.

    `engine_dirs` is empty and `hf` is None for a side that is not tested.
    """

    eval_task: str
    with_perplexity: bool
    engine_dirs: tuple[str, ...]
    hf: HfSource | None
    model_dir: str | None
    data: DataSource
    tokenizer: TokenizerSource
    decoding: Decoding
    output_len: int
    batch_size: int
    end_ids: tuple[int, ...] | None
    pad_id: int | None
    stop_words: tuple[str, ...]
    bad_words: tuple[str, ...]
    device: str | None
    max_attention_window: int | None
    tuning: bool
    may_share_gpu: bool
    checks: Checks
    output_dir: str | None
    remarks: tuple[str, ...]

    @property
    def generates(self) -> bool:
        return self.eval_task != "ppl"

    @property
    def has_references(self) -> bool:
        return self.eval_task == "summarize"


def plan_evaluation(flags: Mapping[str, Any]) -> EvaluationPlan:
    """The evaluation that `flags` ask for; UserError for flags that contradict each other."""
    _refuse(flags)
    decoding = Decoding.from_flags(flags)
    return EvaluationPlan(
        eval_task=flags["eval_task"],
        with_perplexity=flags["eval_ppl"] or flags["eval_task"] == "ppl",
        engine_dirs=tuple(flags["engine_dir"]) if flags["test_trt_llm"] else (),
        hf=_hf_source(flags),
        model_dir=flags["hf_model_location"],
        data=DataSource(
            path=flags["dataset_path"] or None,
            articles=flags["batch_size"] * flags["max_ite"],
            ppl_file=flags["ppl_file"],
            max_input_length=flags["max_input_length"],
            add_special_tokens=not flags["no_add_special_tokens"],
        ),
        tokenizer=TokenizerSource(
            folder=flags["tokenizer_dir"],
            vocab_file=flags["vocab_file"],
            tokenizer_type=flags["tokenizer_type"],
            trust_remote_code=flags["trust_remote_code"],
        ),
        decoding=decoding,
        output_len=flags["output_len"],
        batch_size=flags["batch_size"],
        end_ids=None if flags["end_id"] is None else tuple(flags["end_id"]),
        pad_id=flags["pad_id"],
        stop_words=tuple((flags["stop_words"] or [()])[0]),
        bad_words=tuple((flags["bad_words"] or [()])[0]),
        device=None if flags["device"] == "auto" else flags["device"],
        max_attention_window=flags["max_attention_window_size"],
        tuning=not flags["no_tuning"],
        may_share_gpu=flags["oversubscribe_gpu"],
        checks=Checks(
            rouge1=flags["tensorrt_llm_rouge1_threshold"] if flags["check_accuracy"] else None,
            parity=flags["check_parity"],
        ),
        output_dir=flags["output_dir"],
        remarks=tuple(_remarks(flags, decoding)),
    )


def _hf_source(flags: Mapping[str, Any]) -> HfSource | None:
    if not flags["test_hf"]:
        return None
    return HfSource(
        folder=flags["hf_model_location"],
        dtype=DATA_TYPES[flags["data_type"]],
        device_map_auto=flags["hf_device_map_auto"],
        trust_remote_code=flags["trust_remote_code"],
    )


def _remarks(flags: Mapping[str, Any], decoding: Decoding) -> Iterator[str]:
    ignored = [f"--{name}" for name in MEANINGLESS if flags[name]]
    if ignored:
        yield f"without meaning here and ignored: {', '.join(ignored)}"
    if decoding.idle_flags:
        idle = ", ".join(decoding.idle_flags)
        yield f"{idle} without effect while --top_k is 1; add --top_k 0"
    if flags["max_attention_window_size"] is not None and flags["test_hf"]:
        yield (
            "--max_attention_window_size holds for the engine only: transformers attends to all "
            "tokens"
        )


class _Rule(NamedTuple):
    """A combination of flags that is refused, and the sentence that says so."""

    is_broken: Callable[[Mapping[str, Any]], bool]
    sentence: str


RULES = (
    _Rule(
        lambda f: not (f["test_hf"] or f["test_trt_llm"]),
        "neither --test_hf nor --test_trt_llm is given; say with them which side to test, or both",
    ),
    _Rule(
        lambda f: f["test_hf"] and f["hf_model_location"] is None,
        "--test_hf needs the checkpoint; name its folder or hub id with --hf_model_location",
    ),
    _Rule(
        lambda f: f["check_accuracy"] and not (
            f["test_trt_llm"] and f["eval_task"] == "summarize"
        ),
        "--check_accuracy compares an engine's ROUGE-1 with a threshold; add --test_trt_llm, with "
        "--eval_task summarize",
    ),
    _Rule(
        lambda f: f["check_parity"] is not None and not (f["test_trt_llm"] and f["test_hf"]),
        "--check_parity compares an engine with the checkpoint; add both --test_trt_llm and "
        "--test_hf",
    ),
    _Rule(
        lambda f: f["check_parity"] is not None
        and f["eval_task"] == "generate"
        and not f["eval_ppl"],
        "--check_parity compares scores and --eval_task generate has none; add --eval_ppl or "
        "choose --eval_task summarize",
    ),
    _Rule(
        lambda f: f["ppl_file"] is not None and not f["eval_ppl"] and f["eval_task"] != "ppl",
        "--ppl_file is a text for perplexity; add --eval_ppl or --eval_task ppl",
    ),
    _Rule(
        lambda f: f["hf_device_map_auto"] and not f["test_hf"],
        "--hf_device_map_auto belongs to --test_hf; add that flag or leave this one out",
    ),
    _Rule(
        lambda f: f["test_trt_llm"] and len(f["engine_dir"]) > 1 and env.under_mpi(),
        "several --engine_dir are each started as a job of their own; run summarize.py without "
        "mpirun",
    ),
)  # fmt: skip


def _refuse(flags: Mapping[str, Any]) -> None:
    for rule in RULES:
        if rule.is_broken(flags):
            raise UserError(rule.sentence)
    for name in ENGINE_ONLY:
        if flags[name] and flags["test_hf"]:
            raise UserError(
                f"--{name} {flags[name]} is not known to transformers, so the sides would not do "
                "the same; leave it or --test_hf out"
            )
    if flags["min_length"] > flags["output_len"]:
        raise UserError(
            f"--min_length {flags['min_length']} is more than --output_len {flags['output_len']}; "
            "lower the one or raise the other"
        )
    for name in ("stop_words", "bad_words"):
        if flags[name] and len(flags[name]) > 1:
            raise UserError(
                f"--{name} is given {len(flags[name])} times; give it once, with all words"
            )
    if flags["test_trt_llm"]:
        _check_engine_dirs(flags["engine_dir"])


def _check_engine_dirs(folders: list[str]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        path = Path(folder).resolve()
        if not path.is_dir():
            raise UserError(
                f"--engine_dir {folder} does not exist; build an engine with build.py "
                "--output_dir, or name one that is there"
            )
        if path in seen:
            raise UserError(f"--engine_dir {folder} is named twice; name it once")
        seen.add(path)
