"""A run's request: prompts, words and end tokens as ids, made on rank 0 and known on every rank.

Only rank 0 touches tokenizers, input files, standard input and the hub.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from engine.errors import UserError
from utils import prompts as reader
from utils.chat_template import read_json
from utils.generation import Words, encode_words
from utils.hub import resolve_model_dir
from utils.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.comm import World
    from engine.sampling import SamplingParams
    from utils.run_plan import RunPlan

T = TypeVar("T")

# TensorRT-LLM's, for a run that is given no prompt.
DEFAULT_TEXT = "Born in north-east France, Soyer trained as a"


@dataclass(frozen=True)
class Request:
    """What to generate from: a list of words per prompt; no prompts when they are to be typed."""

    prompts: tuple[tuple[int, ...], ...]
    stop_words: tuple[Words, ...]
    bad_words: tuple[Words, ...]
    end_ids: tuple[int, ...]
    pad_id: int

    @property
    def is_typed(self) -> bool:
        return not self.prompts


def on_root(world: World, make: Callable[[], T]) -> T:
    """`make()` run on rank 0: its value on every rank, or its UserError raised on every rank."""
    value, error = None, None
    if world.rank == 0:
        try:
            value = make()
        except UserError as raised:
            error = raised
    value, error = world.bcast((value, error))
    if error is not None:
        raise error
    return value


def prepare_request(plan: RunPlan, world: World) -> tuple[Tokenizer | None, Request]:
    """The request of `plan`, and on rank 0 the tokenizer if there is one.

    Raises UserError on every rank for whatever is wrong with tokenizer, prompts, words or the
    files that the run is to write.
    """
    tokenizer: Tokenizer | None = None

    def make() -> Request:
        nonlocal tokenizer
        plan.files.check()
        tokenizer = open_tokenizer(plan)
        return make_request(plan, tokenizer)

    request = on_root(world, make)
    return tokenizer, request


def open_tokenizer(plan: RunPlan) -> Tokenizer | None:
    """The tokenizer that the flags name, else the one in the engine directory or of the checkpoint
    it was built from; None if there is none."""
    source = plan.tokenizer
    if source.folder is not None:
        folder = resolve_model_dir(source.folder, "--tokenizer_dir", need="tokenizer")
    elif source.vocab_file is not None:
        folder = Path(source.vocab_file).parent
    else:
        found = find_tokenizer(Path(plan.engine_dir))
        if found is None:
            return None
        folder = found
    return load_tokenizer(
        folder,
        trust_remote_code=source.trust_remote_code,
        vocab_file=source.vocab_file,
        tokenizer_type=source.tokenizer_type,
    )


def find_tokenizer(engine_dir: Path) -> Path | None:
    """A folder with a tokenizer: the engine directory, or the checkpoint its record names."""
    record = read_json(engine_dir / "config.json").get("engine") or {}
    folders = (engine_dir, Path(record.get("source") or engine_dir))
    return next((folder for folder in folders if has_tokenizer(folder)), None)


def make_request(plan: RunPlan, tokenizer: Tokenizer | None) -> Request:
    """Read and encode what the plan names."""
    source = plan.prompts
    end_ids = plan.end_ids
    if end_ids is None:
        end_ids = () if tokenizer is None else tokenizer.end_ids
        if source.chat and tokenizer is not None:
            end_ids = tuple(dict.fromkeys((*end_ids, *tokenizer.turn_end_ids())))
    pad_id = plan.pad_id
    if pad_id is None:
        known = None if tokenizer is None else tokenizer.pad_id
        pad_id = known if known is not None else next(iter(end_ids), 0)
    prompts = _read_prompts(plan, tokenizer, padding={pad_id, *end_ids})
    count = max(len(prompts), 1)
    words: dict[str, tuple[Words, ...]] = {}
    for name in ("stop_words", "bad_words"):
        lists = getattr(plan, name)
        words[name] = ((),) * count
        if lists is not None:
            owner = _required(tokenizer, plan, f"--{name}")
            words[name] = encode_words(owner, lists, count, f"--{name}")
    return Request(prompts=tuple(map(tuple, prompts)), end_ids=end_ids, pad_id=pad_id, **words)


def _read_prompts(
    plan: RunPlan, tokenizer: Tokenizer | None, *, padding: set[int]
) -> list[list[int]]:
    """Prompts of the plan; none if they are to be typed."""
    source = plan.prompts
    if source.file is not None and reader.holds_ids(source.file):
        prompts = reader.read_ids(source.file, padding=padding)
        where = f"--input_file {source.file}"
    else:
        tokenizer = _required(tokenizer, plan, "text")
        if source.interactive or (source.may_be_typed and sys.stdin.isatty()):
            return []
        where = f"--input_file {source.file}" if source.file is not None else "--input_text"
        texts = reader.read_texts(source.file) if source.file is not None else source.texts
        texts = texts if texts is not None else (DEFAULT_TEXT,)
        reader.check_texts(texts, where)
        if source.chat:
            prompts = reader.encode_chats(tokenizer, texts, source.system_prompt)
        else:
            prompts = reader.encode_texts(
                tokenizer, texts, add_special_tokens=source.add_special_tokens
            )
    reader.check_prompts(prompts, where)
    return reader.limit_length(prompts, source.max_tokens)


def _required(tokenizer: Tokenizer | None, plan: RunPlan, use: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"--tokenizer_dir is not given and --engine_dir {plan.engine_dir} holds no tokenizer, "
            f"which {use} needs; name the checkpoint's folder with --tokenizer_dir"
        )
    return tokenizer


def make_params(plan: RunPlan, request: Request) -> list[SamplingParams]:
    """One entry per prompt (one in all if they are typed); RequestError for impossible values."""
    from engine.sampling import SamplingParams

    return [
        SamplingParams(
            max_new_tokens=plan.max_output_len,
            end_ids=request.end_ids,
            pad_id=request.pad_id,
            stop_words=stop,
            bad_words=bad,
            log_probs=plan.files.has_scores,
            **vars(plan.decoding),
        )
        for stop, bad in zip(request.stop_words, request.bad_words, strict=True)
    ]
