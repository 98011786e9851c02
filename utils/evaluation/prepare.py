"""From a plan to a task: records, tokenizer, texts and token ids. Rank 0 runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from utils.chat_template import read_json
from utils.datasets import load_rows
from utils.evaluation.perplexity import WINDOW, cut_windows
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.task import Case, Ids, Rules, Task
from utils.generation import encode_words
from utils.hub import resolve_model_dir
from utils.output import check_writable
from utils.request import find_tokenizer
from utils.tokenizer import Tokenizer, as_ids, load_tokenizer

if TYPE_CHECKING:
    from engine.record import EngineRecord

SPLIT = "test"
# TensorRT-LLM's way to ask for a summary.
SUMMARY_CUE = " TL;DR: "
# Rows that a model may have after its tokenizer's last id, for the sake of alignment.
MOST_PADDING = 1024


@dataclass(frozen=True)
class Prepared:
    """`records` are those of the plan's engines, `hf_dir` the checkpoint if it is tested; `notes`
    say what the task had to leave out and what makes a comparison doubtful."""

    task: Task
    records: tuple[EngineRecord, ...]
    hf_dir: Path | None
    notes: tuple[str, ...]


def prepare(plan: EvaluationPlan) -> tuple[Tokenizer, Prepared]:
    """UserError for whatever is wrong with engines, tokenizer, data or the output folder."""
    from engine.backends import read_record
    from utils.evaluation.engine_side import make_params

    if plan.output_dir is not None:
        check_writable(str(Path(plan.output_dir) / "report.json"), "--output_dir")
    records = tuple(read_record(folder) for folder in plan.engine_dirs)
    splits = _check_limits(plan, records) if plan.generates else []
    tokenizer = open_tokenizer(plan)
    for folder, record in zip(plan.engine_dirs, records, strict=True):
        check_vocabulary(tokenizer, record.config.vocab_size, f"--engine_dir {folder}")
    hf_dir, doubts = _find_checkpoint(plan, tokenizer, records)
    rows = _read_rows(plan)
    longest = min((record.limits.max_input_len for record in records), default=None)
    cases, cut = _make_cases(plan, tokenizer, rows, longest)
    windows, narrowed = _make_windows(plan, tokenizer, rows, longest)
    rules = _make_rules(plan, tokenizer, records)
    make_params(rules)  # refuses impossible values before anything is computed
    task = Task(cases, rules, plan.batch_size, windows)
    notes = (*doubts, *splits, *cut, *narrowed)
    return tokenizer, Prepared(task, records, hf_dir, notes)


def open_tokenizer(plan: EvaluationPlan) -> Tokenizer:
    """That of --tokenizer_dir, else of the checkpoint, else of the first engine's directory."""
    source = plan.tokenizer
    if source.folder is not None:
        folder = resolve_model_dir(source.folder, "--tokenizer_dir", need="tokenizer")
    elif source.vocab_file is not None:
        folder = Path(source.vocab_file).parent
    elif plan.model_dir is not None:
        folder = resolve_model_dir(plan.model_dir, "--hf_model_location", need="tokenizer")
    else:
        found = find_tokenizer(Path(plan.engine_dirs[0]))
        if found is None:
            raise UserError(
                f"--engine_dir {plan.engine_dirs[0]} holds no tokenizer; name the checkpoint's "
                "folder with --tokenizer_dir"
            )
        folder = found
    return load_tokenizer(
        folder,
        trust_remote_code=source.trust_remote_code,
        vocab_file=source.vocab_file,
        tokenizer_type=source.tokenizer_type,
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """UserError unless the model has a row for each of the tokenizer's ids, and few more."""
    if not 0 <= vocab_size - tokenizer.vocab_size < MOST_PADDING:
        raise UserError(
            f"{where} has a vocabulary of {vocab_size} and the tokenizer one of "
            f"{tokenizer.vocab_size}, which is another; name the model's own with --tokenizer_dir"
        )


def _find_checkpoint(
    plan: EvaluationPlan, tokenizer: Tokenizer, records: tuple[EngineRecord, ...]
) -> tuple[Path | None, list[str]]:
    """The folder of the model for transformers, and a note per engine of another shape."""
    if plan.hf is None:
        return None, []
    folder = resolve_model_dir(plan.hf.folder, "--hf_model_location")
    config = read_json(folder / "config.json")
    if "vocab_size" in config:
        check_vocabulary(tokenizer, config["vocab_size"], f"--hf_model_location {plan.hf.folder}")
    notes = []
    for engine_dir, record in zip(plan.engine_dirs, records, strict=True):
        shape = (record.config.num_layers, record.config.hidden_size)
        other = (config.get("num_hidden_layers"), config.get("hidden_size"))
        if shape != other:
            notes.append(
                f"--engine_dir {engine_dir} has {shape[0]} layers of width {shape[1]} and "
                f"--hf_model_location {other[0]} of {other[1]}: they are different models"
            )
    return folder, notes


def _check_limits(plan: EvaluationPlan, records: tuple[EngineRecord, ...]) -> list[str]:
    """UserError for what an engine was not built for; a note for batches that it splits."""
    notes = []
    for folder, record in zip(plan.engine_dirs, records, strict=True):
        limits, beams = record.limits, plan.decoding.num_beams
        if plan.output_len > limits.max_output_len:
            raise UserError(
                f"--output_len {plan.output_len} exceeds --max_output_len {limits.max_output_len} "
                f"of --engine_dir {folder}; ask for less or build with more"
            )
        if beams > limits.max_beam_width:
            raise UserError(
                f"--num_beams {beams} exceeds --max_beam_width {limits.max_beam_width} of "
                f"--engine_dir {folder}; ask for fewer or build with more"
            )
        if plan.batch_size > limits.max_batch_size:
            notes.append(
                f"--engine_dir {folder} was built for --max_batch_size {limits.max_batch_size} and "
                f"answers batches of {plan.batch_size} in parts"
            )
    return notes


def _read_rows(plan: EvaluationPlan) -> list[dict[str, str]]:
    if not plan.generates and plan.data.ppl_file is not None:
        return []
    columns = ("article", "highlights") if plan.has_references else ("article",)
    return load_rows(plan.data.path, split=SPLIT, columns=columns, limit=plan.data.articles)


def _make_cases(
    plan: EvaluationPlan, tokenizer: Tokenizer, rows: list[dict[str, str]], longest: int | None
) -> tuple[tuple[Case, ...], list[str]]:
    """One case per row; prompts keep their last tokens, and a note counts those that an engine's
    limit, not --max_input_length, has cut."""
    if not plan.generates:
        return (), []
    special, wanted = plan.data.add_special_tokens, plan.data.max_input_length
    kept = min(wanted, longest or wanted)
    cases, cut = [], 0
    for number, row in enumerate(rows):
        text = make_prompt(row["article"]) if plan.has_references else row["article"]
        ids = tokenizer.encode(text, add_special_tokens=special)
        if not ids:
            raise UserError(f"--dataset_path: 'article' of row {number} is empty; leave it out")
        cut += min(len(ids), wanted) > kept
        cases.append(Case(str(number), tuple(ids[-kept:]), row.get("highlights")))
    if not cut:
        return tuple(cases), []
    return tuple(cases), [
        f"{cut} of {len(rows)} prompts are cut to their last {kept} tokens, the engine's "
        "--max_input_len; build it with more to keep them whole"
    ]


def make_prompt(article: str) -> str:
    """TensorRT-LLM's prompt: the cue at the end, and "n't" joined to its verb."""
    return (article + SUMMARY_CUE).strip().replace(" n't", "n't")


def _make_windows(
    plan: EvaluationPlan, tokenizer: Tokenizer, rows: list[dict[str, str]], longest: int | None
) -> tuple[tuple[Ids, ...], list[str]]:
    if not plan.with_perplexity:
        return (), []
    texts = [row["article"] for row in rows]
    if plan.data.ppl_file is not None:
        texts = [_read_text(plan.data.ppl_file)]
    window = min(WINDOW, longest or WINDOW)
    windows = [ids for text in texts for ids in cut_windows(tokenizer.encode(text), window)]
    if not windows:
        where = f"--ppl_file {plan.data.ppl_file}" if plan.data.ppl_file else "--dataset_path"
        raise UserError(f"{where} has no text of two tokens for perplexity; give more text")
    notes = []
    if window < WINDOW:
        notes = [
            f"perplexity is measured in windows of {window} tokens, the engine's --max_input_len, "
            f"and cannot be compared with that in windows of {WINDOW}"
        ]
    return tuple(windows), notes


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    raise UserError(f"--ppl_file {path} cannot be read: {reason}; name a UTF-8 text file")


def _make_rules(
    plan: EvaluationPlan, tokenizer: Tokenizer, records: tuple[EngineRecord, ...]
) -> Rules:
    """Both sides end at the same ids: the flag's, else the tokenizer's and the engines'."""
    end_ids = plan.end_ids
    if end_ids is None:
        stored: list[Any] = [record.generation.get("eos_token_id") for record in records]
        known = [i for entry in stored for i in as_ids(entry)]
        end_ids = tuple(dict.fromkeys((*tokenizer.end_ids, *known)))
    pad_id = plan.pad_id if plan.pad_id is not None else tokenizer.pad_id
    words = {}
    for name in ("stop_words", "bad_words"):
        [words[name]] = encode_words(tokenizer, [getattr(plan, name)], 1, f"--{name}")
    return Rules(
        decoding=plan.decoding,
        max_new_tokens=plan.output_len,
        end_ids=end_ids,
        pad_id=pad_id if pad_id is not None else next(iter(end_ids), 0),
        **words,
    )
