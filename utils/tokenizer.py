"""Tokenizer: ids that equal the tokenizer file's own, text back from ids, and chat prompts.

`load_tokenizer` decides which file of a folder is the truth: tokenizer.model where there is one,
because a tokenizer.json beside it is often a faulty conversion. No code of a checkpoint is run
unless the caller trusts it. Knows nothing of hubs, prompts files or engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError
from utils import log
from utils.chat_template import Message, find_chat_template, read_json, render_chat
from utils.pieces import StreamDecoder, is_byte_piece
from utils.token_codecs import AddedToken, Codec, JsonCodec, SentencePieceCodec

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
# With one of these transformers may still know what to do.
_OTHER_FILES = (CONFIG_FILE, "vocab.json")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Classes that put bos before a prompt unless their tokenizer_config.json says otherwise.
_BOS_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "YiTokenizer")
_SYMBOL = re.compile(r"<[^\s<>]+>")


@dataclass(frozen=True)
class Settings:
    """What the JSON files of a tokenizer folder say, whichever file holds the vocabulary."""

    folder: Path
    config: Mapping[str, Any]  # tokenizer_config.json
    generation: Mapping[str, Any]  # generation_config.json
    added: Mapping[str, AddedToken]
    named: Mapping[str, str]  # bos_token and so on, as text

    def wants(self, name: str) -> bool | None:
        """add_bos_token or add_eos_token, None if the folder does not say."""
        value = self.config.get(name)
        return value if isinstance(value, bool) else None


class Tokenizer:
    """Text to token ids and back; made by `load_tokenizer`."""

    def __init__(self, codec: Codec, settings: Settings):
        self._codec = codec
        self._settings = settings
        self.vocab_size = codec.vocab_size
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token")
        prefix, suffix = codec.affixes
        self._prefix = _choose(settings.wants("add_bos_token"), self.bos_id, prefix)
        self._suffix = _choose(settings.wants("add_eos_token"), self.eos_id, suffix)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text: eos and those of generation_config.json, without repeats."""
        listed = as_ids(self._settings.generation.get("eos_token_id"))
        own = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*own, *listed)))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; special tokens spelled out in it become their ids. With
        `add_special_tokens` the folder's own bos and eos are put around, if it has any."""
        ids = self._codec.encode(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; wrong bytes become U+FFFD, ids outside the vocabulary nothing."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that come bit by bit."""
        return StreamDecoder(self._codec.pieces, skip_special_tokens=skip_special_tokens)

    def word_ids(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token sequences that `word` can appear as inside a text.

        These are the word as it is and, unless it begins with a space, the word after one. A word
        that the vocabulary has only joined with its neighbours is not among them.
        """
        spellings = [word, " " + word] if word and not word[0].isspace() else [word]
        found = (tuple(self._encode_inside(spelling)) for spelling in spellings)
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt that asks for the answer to `messages` (role, content)."""
        return self._codec.encode(self._render(messages, add_generation_prompt=True))

    def turn_end_ids(self) -> tuple[int, ...]:
        """The token that the chat template puts after an answer, if it is one symbol."""
        mark = "answer-ends-here"
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": mark})
        tail = self._render(messages, add_generation_prompt=False).partition(mark)[2]
        symbol = _SYMBOL.match(tail)
        ids = self._codec.encode(symbol[0]) if symbol else []
        return tuple(ids) if len(ids) == 1 else ()

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        template = find_chat_template(self._settings.folder, self._settings.config)
        if template is None:
            raise UserError(
                f"--chat needs a chat template, and {self._settings.folder} has none in "
                f"chat_template.jinja, {CONFIG_FILE} or generation_config.json; use a chat model's "
                "tokenizer or run without --chat"
            )
        return render_chat(
            template, messages, self._settings.named, add_generation_prompt=add_generation_prompt
        )

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of `text` after other tokens: without the space some tokenizers put at the start."""
        anchor = next((t for t, a in self._settings.added.items() if not a.rstrip), None)
        anchor = self._settings.named.get("eos_token", anchor)
        ids = self._codec.encode(text if anchor is None else anchor + text)
        return ids if anchor is None else ids[len(self._codec.encode(anchor)) :]

    def _named_id(self, name: str) -> int | None:
        text = self._settings.named.get(name)
        if text is not None:
            return self._codec.token_id(text)
        return next(iter(as_ids(self._settings.generation.get(f"{name}_id"))), None)


def as_ids(entry: Any) -> tuple[int, ...]:
    """A token id entry of a generation config: none, one number or a list of them."""
    entries = entry if isinstance(entry, list | tuple) else [entry]
    return tuple(i for i in entries if isinstance(i, int) and not isinstance(i, bool))


def _choose(wanted: bool | None, token: int | None, default: list[int]) -> list[int]:
    if wanted is None:
        return default
    return [token] if wanted and token is not None else []


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer file that `load_tokenizer` reads without transformers."""
    return any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def load_tokenizer(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    vocab_file: str | None = None,
    tokenizer_type: str | None = None,
) -> Tokenizer:
    """The tokenizer in the local folder `path`.

    `vocab_file` is a sentencepiece model to use instead of the folder's. Without tokenizer.model
    and tokenizer.json the folder goes to transformers: `tokenizer_type` then names the class, by
    model type, and `trust_remote_code` allows code of the checkpoint. Raises UserError for missing,
    damaged or unknown files.
    """
    settings = _read_settings(Path(path))
    model, converted = (settings.folder / name for name in (MODEL_FILE, JSON_FILE))
    if vocab_file is not None:
        if not Path(vocab_file).is_file():
            raise UserError(f"--vocab_file {vocab_file} does not exist; name a sentencepiece model")
        return _make_from_model(SentencePieceCodec(Path(vocab_file), settings.added), settings)
    if not has_tokenizer(settings.folder):
        return _load_with_transformers(settings, tokenizer_type, trust_remote_code)
    if model.is_file():
        codec = SentencePieceCodec(model, settings.added)
        if not _is_replaced(codec.vocabulary(), converted):
            return _make_from_model(codec, settings)
        log.warning(f"{converted} has another vocabulary than {MODEL_FILE} beside it; it is used")
    content = converted.read_text(encoding="utf-8")
    return Tokenizer(JsonCodec(content, settings.added, str(converted)), settings)


def _make_from_model(codec: SentencePieceCodec, settings: Settings) -> Tokenizer:
    """tokenizer.model says less than tokenizer.json; classes and the model itself fill the gaps."""
    puts_bos = settings.config.get("tokenizer_class") in _BOS_CLASSES
    config = {"add_bos_token": puts_bos, **settings.config}
    return Tokenizer(
        codec, replace(settings, config=config, named={**codec.named, **settings.named})
    )


def _is_replaced(pieces: Sequence[str], converted: Path) -> bool:
    """Whether tokenizer.json is no conversion of tokenizer.model: a fine-tune's own vocabulary."""
    vocab = read_json(converted).get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # a unigram model lists [piece, score]
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    return any(i >= len(pieces) or pieces[i] != piece for piece, i in vocab.items())


def _load_with_transformers(
    settings: Settings, tokenizer_type: str | None, trust_remote_code: bool
) -> Tokenizer:
    """Through AutoTokenizer: other file formats, or a checkpoint's own code."""
    folder = settings.folder
    if not any((folder / name).is_file() for name in _OTHER_FILES):
        raise UserError(
            f"{folder} has no tokenizer ({MODEL_FILE} or {JSON_FILE}); name a folder that has one "
            "with --tokenizer_dir"
        )
    if "auto_map" in settings.config and not trust_remote_code:
        raise UserError(
            f"{folder} brings its tokenizer as Python code; add {MODEL_FILE} or {JSON_FILE}, or "
            "allow the code to run with --trust_remote_code"
        )
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(
            str(folder),
            tokenizer_type=tokenizer_type,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"transformers cannot load the tokenizer in {folder} ({reason}); use a folder with "
            f"{MODEL_FILE} or {JSON_FILE}"
        ) from None
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer class {type(made).__name__} of {folder} has no tokenizer.json form; "
            f"add {MODEL_FILE} or {JSON_FILE} to the folder"
        )
    return Tokenizer(JsonCodec(backend.to_str(), settings.added, str(folder)), settings)


def _read_settings(folder: Path) -> Settings:
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist; correct --tokenizer_dir")
    config = read_json(folder / CONFIG_FILE)
    written = {**read_json(folder / "special_tokens_map.json"), **config}
    named = {name: _text_of(written.get(name)) for name in NAMED_TOKENS}
    named = {name: text for name, text in named.items() if text}
    special = {*named.values()}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = written.get(key) or ()
        special |= {_text_of(t) for t in (extra.values() if isinstance(extra, dict) else extra)}
    return Settings(
        folder=folder,
        config=config,
        generation=read_json(folder / "generation_config.json"),
        added=_read_added(folder, config, special),
        named=named,
    )


def _read_added(
    folder: Path, config: Mapping[str, Any], special: set[str | None]
) -> dict[str, AddedToken]:
    """Added tokens by text, from the three files that may declare them; the last one wins.

    Some converters declare the byte pieces, too; those are no text to look for.
    """
    entries = [
        {"id": i, "content": text} for text, i in read_json(folder / "added_tokens.json").items()
    ]
    entries += read_json(folder / JSON_FILE).get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    entries += [{**entry, "id": int(i)} for i, entry in decoder.items()]
    return {
        entry["content"]: AddedToken(
            id=entry["id"],
            special=bool(entry.get("special")) or entry["content"] in special,
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
        )
        for entry in entries
        if not is_byte_piece(entry["content"])
    }


def _text_of(entry: Any) -> str | None:
    """A token is written as its text or as an object with its text in it."""
    entry = entry.get("content") if isinstance(entry, dict) else entry
    return entry if isinstance(entry, str) else None
