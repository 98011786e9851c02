"""From token ids back to text: every id stands for bytes, and bytes join to UTF-8.

Knows how the two families of tokenizer files spell bytes; knows nothing of encoding or of files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum

SPACE_MARK = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_byte_piece(text: str) -> bool:
    """Whether `text` is sentencepiece's name of a single byte."""
    return _BYTE_PIECE.fullmatch(text) is not None


class Spelling(Enum):
    """How a vocabulary writes bytes as text."""

    SENTENCEPIECE = "sentencepiece"  # "▁" for a space, "<0x0A>" for a single byte
    BYTE_LEVEL = "byte-level"  # GPT-2's: one printable character per byte


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the rest starts at 256.

    Source: Radford et al. 2019, the encoder published with GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL = byte_level_alphabet()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD per wrong byte, as sentencepiece does; Python's own handler joins some."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


ERRORS = "replace_each_byte"
codecs.register_error(ERRORS, _replace_each_byte)


class Pieces:
    """The bytes of every id of one vocabulary.

    `piece_of` gives the vocabulary's own spelling of an id, or None past its end; `added` are
    tokens whose text stands as it is; `special` are the ids that decoding may skip; with
    `strip_space` the first space of a text is the tokenizer's own and is dropped.
    """

    def __init__(
        self,
        piece_of: Callable[[int], str | None],
        spelling: Spelling,
        *,
        added: Mapping[int, str],
        special: Iterable[int],
        strip_space: bool,
    ):
        self._piece_of = piece_of
        self._spelling = spelling
        if spelling is Spelling.SENTENCEPIECE:
            # Some converters declare the byte pieces as special tokens; they are text all the same.
            bytes_declared = {i for i, text in added.items() if is_byte_piece(text)}
            added = {i: text for i, text in added.items() if i not in bytes_declared}
            special = set(special) - bytes_declared
        self._added = added
        self._bytes: dict[int, bytes] = {}
        self.special = frozenset(special)
        self.strip_space = strip_space

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; none for an id the vocabulary does not have."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._piece_of(token)
        if piece is None:
            return b""
        if self._spelling is Spelling.BYTE_LEVEL:
            spelled = [_BYTE_LEVEL.get(character) for character in piece]
            return piece.encode() if None in spelled else bytes(spelled)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


class StreamDecoder:
    """Text of ids that come bit by bit; the parts joined are the text of all ids at once.

    Bytes that do not yet make a character are held back until they do or until `finish`.
    """

    def __init__(self, pieces: Pieces, *, skip_special_tokens: bool = True):
        self._pieces = pieces
        self._skipped = pieces.special if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(ERRORS)
        self._is_first = pieces.strip_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        data = b"".join(self._pieces.bytes_of(i) for i in ids if i not in self._skipped)
        if data and self._is_first:
            data, self._is_first = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is still held back, as replacement characters."""
        return self._decoder.decode(b"", final=True)
