"""One codec per tokenizer file format: text to ids exactly as the file itself says.

tokenizer.model is read by sentencepiece, tokenizer.json by tokenizers; neither passes through a
class of transformers, whose Llama tokenizer replaces the file's own rules for spaces. Knows
nothing of folders, chats or prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from engine.errors import UserError
from utils.pieces import SPACE_MARK, Pieces, Spelling

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# A private-use character: no vocabulary has it, so it never joins a piece with what follows it.
_GUARD = "\ue000"

# Decoders of tokenizer.json that `Pieces` understands.
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}


class AddedToken(NamedTuple):
    """A token that is matched in text before anything else; lstrip/rstrip take spaces with it."""

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Codec(Protocol):
    """What a tokenizer file offers. `affixes` are the ids it puts before and after a prompt."""

    pieces: Pieces
    vocab_size: int
    affixes: tuple[list[int], list[int]]

    def encode(self, text: str) -> list[int]: ...

    def token_id(self, token: str) -> int | None: ...


class SentencePieceCodec:
    """tokenizer.model. Ids are sentencepiece's, with two rules it does not have itself: control
    symbols and `added` tokens are matched in text, and only the start of a text gets the model's
    dummy space."""

    def __init__(self, path: Path, added: Mapping[str, AddedToken]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError):
            raise UserError(
                f"{path} is not a sentencepiece model (a Git LFS pointer or a damaged download?); "
                "fetch the file again"
            ) from None
        size = self._model.get_piece_size()
        controls = [
            i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)
        ]
        self._added = {self._model.id_to_piece(i): AddedToken(i) for i in controls} | dict(added)
        self._split = _make_splitter(self._added)
        has_dummy_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._guard = self._model.encode(_GUARD) if has_dummy_space else []
        self.vocab_size = max([size, *(token.id + 1 for token in self._added.values())])
        self.affixes: tuple[list[int], list[int]] = ([], [])
        own = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        self.named = {name: self._model.id_to_piece(i) for name, i in own.items() if i >= 0}
        self.pieces = Pieces(
            lambda i: self._model.id_to_piece(i) if i < size else None,
            Spelling.SENTENCEPIECE,
            added={token.id: text for text, token in self._added.items()},
            special=(token.id for token in self._added.values() if token.special),
            strip_space=has_dummy_space,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._split.finditer(text):
            ids += self._encode_part(text[end : match.start()], is_start=not ids)
            ids.append(self._added[match[match.lastindex]].id)
            end = match.end()
        return ids + self._encode_part(text[end:], is_start=not ids)

    def _encode_part(self, text: str, *, is_start: bool) -> list[int]:
        if is_start or not self._guard or not text:
            return self._model.encode(text)
        ids = self._model.encode(_GUARD + text)
        assert ids[: len(self._guard)] == self._guard, "the guard joined the text"
        return ids[len(self._guard) :]

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        found = self._model.piece_to_id(token)
        return None if self._model.is_unknown(found) else found

    def vocabulary(self) -> list[str]:
        """The pieces of tokenizer.model, in the order of their ids."""
        return self._model.id_to_piece(list(range(self._model.get_piece_size())))


def _make_splitter(added: Mapping[str, AddedToken]) -> re.Pattern[str]:
    """Matches any added token, of two at one place the longer; one group per token."""
    parts = []
    for text in sorted(added, key=len, reverse=True):
        before, after = (r"\s*" if strip else "" for strip in added[text][2:])
        parts.append(f"{before}({re.escape(text)}){after}")
    return re.compile("|".join(parts) or r"(?!)")


class JsonCodec:
    """tokenizer.json, by the tokenizers library: the file's own normalizer and pre-tokenizer."""

    def __init__(self, content: str, added: Mapping[str, AddedToken], where: str):
        self._model = _parse(content, where)
        self._model.no_truncation()
        self._model.no_padding()
        _add_missing(self._model, added, where)
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.affixes = self._find_affixes("a")
        tokens = self._model.get_added_tokens_decoder()
        special = {i for i, token in tokens.items() if token.special}
        special |= {token.id for token in added.values() if token.special}
        spelling, strip_space = _read_decoder(json.loads(content).get("decoder"), where)
        self.pieces = Pieces(
            self._model.id_to_token,
            spelling,
            added={i: token.content for i, token in tokens.items()},
            special=special,
            strip_space=strip_space,
        )

    def _find_affixes(self, sample: str) -> tuple[list[int], list[int]]:
        plain = self.encode(sample)
        whole = self._model.encode(sample, add_special_tokens=True).ids
        places = (i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain)
        before = next(places, len(whole))
        return whole[:before], whole[before + len(plain) :]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)


def _parse(content: str, where: str) -> RustTokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{where} is not a tokenizer.json that this tokenizers release can read ({error}); "
            "fetch the file again or upgrade tokenizers"
        ) from None


def _add_missing(model: RustTokenizer, added: Mapping[str, AddedToken], where: str) -> None:
    """Add tokens that only tokenizer_config.json declares; their ids must come out as declared."""
    from tokenizers import AddedToken as RustAddedToken

    known = {token.content for token in model.get_added_tokens_decoder().values()}
    for text, token in sorted(added.items(), key=lambda item: item[1].id):
        if text in known:
            continue
        strip = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False}
        model.add_tokens([RustAddedToken(text, special=token.special, **strip)])
        if model.token_to_id(text) != token.id:
            raise UserError(
                f"{where} gives {text!r} the id {model.token_to_id(text)}, tokenizer_config.json "
                f"{token.id}; make the two files agree"
            )


def _read_decoder(decoder: dict[str, Any] | None, where: str) -> tuple[Spelling, bool]:
    """The spelling of the pieces, and whether a text's first space is dropped."""
    steps = (decoder or {}).get("decoders", [decoder] if decoder else [])
    kinds = {step["type"]: step for step in steps}
    if kinds.keys() - _DECODERS:
        raise UserError(
            f"{where}: decoder {sorted(kinds.keys() - _DECODERS)} is not supported; use the "
            "tokenizer of a Llama-like model"
        )
    metaspace = kinds.get("Metaspace", {"prepend_scheme": "never"})
    strip_space = "Strip" in kinds or metaspace.get("prepend_scheme") != "never"
    spelling = Spelling.BYTE_LEVEL if "ByteLevel" in kinds else Spelling.SENTENCEPIECE
    return spelling, strip_space
