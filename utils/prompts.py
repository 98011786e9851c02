"""Prompts as token ids: from texts, from files of texts or ids, or as a chat.

Knows tokenizers and file formats; knows nothing of engines or of what follows a prompt.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path

from engine.errors import UserError
from utils.tokenizer import Tokenizer

Ids = list[int]
ID_FILES = (".csv", ".npy")


def holds_ids(input_file: str) -> bool:
    """Whether the file holds token ids and needs no tokenizer."""
    return Path(input_file).suffix in ID_FILES


def check_texts(texts: Sequence[str], flag: str) -> None:
    """UserError naming `flag` unless every text is text: a shell passes on any bytes."""
    for place, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{flag}: text {place} is not UTF-8; give UTF-8 text") from None


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[Ids]:
    """Ids of each text, with the bos and eos that the tokenizer itself puts around a prompt."""
    return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]


def encode_chats(
    tokenizer: Tokenizer, texts: Sequence[str], system_prompt: str | None = None
) -> list[Ids]:
    """Ids of one chat per text, in which the text is the user's only message."""
    return [
        tokenizer.apply_chat_template([*system_message(system_prompt), user_message(text)])
        for text in texts
    ]


def system_message(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def user_message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def read_texts(input_file: str) -> list[str]:
    """The lines of a UTF-8 text file (.txt), without blank ones."""
    if Path(input_file).suffix != ".txt":
        raise UserError(
            f"--input_file {input_file} is of no known kind; use .txt (a prompt a line), .csv or "
            ".npy (token ids)"
        )
    try:
        content = Path(input_file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(input_file, error.strerror) from None
    except UnicodeDecodeError as error:
        raise _unreadable(input_file, f"byte {error.start} is not UTF-8") from None
    # Not splitlines(): a prompt may contain the other line separators of Unicode.
    return [line for line in content.replace("\r\n", "\n").split("\n") if line.strip()]


def read_ids(input_file: str, *, padding: Collection[int] = ()) -> list[Ids]:
    """Prompts of a .csv (ids of one a line) or a .npy file (one row each, or one prompt in 1-D).

    `padding` ids are cut off both ends of the rows of a 2-D array.
    """
    try:
        if Path(input_file).suffix == ".csv":
            return _read_csv(input_file)
        return _read_npy(input_file, padding)
    except OSError as error:
        raise _unreadable(input_file, error.strerror or str(error)) from None
    except (UnicodeDecodeError, csv.Error):
        raise _unreadable(input_file, "it is no text with commas") from None


def _read_csv(input_file: str) -> list[Ids]:
    prompts = []
    with open(input_file, newline="", encoding="utf-8-sig") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            # A program may end every line with a comma.
            cells = [cell for cell in cells if cell.strip()]
            wrong = next((cell for cell in cells if not cell.strip().isdecimal()), None)
            if wrong is not None:
                raise _unreadable(
                    input_file, f"line {number} holds {wrong!r}, which is no token id"
                )
            if cells:
                prompts.append([int(cell) for cell in cells])
    return prompts


def _read_npy(input_file: str, padding: Collection[int]) -> list[Ids]:
    import numpy as np

    try:
        array = np.load(input_file, allow_pickle=False)
    except (ValueError, EOFError):
        raise _unreadable(input_file, "it is no array of numbers") from None
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise _unreadable(
            input_file, f"it holds {array.dtype} of shape {array.shape}, not rows of token ids"
        )
    if array.ndim == 1:
        return [array.tolist()]
    return [_strip(row, padding) for row in array.tolist()]


def _strip(row: Ids, padding: Collection[int]) -> Ids:
    kept = [place for place, token in enumerate(row) if token not in padding]
    return row[kept[0] : kept[-1] + 1] if kept else []


def _unreadable(input_file: str, reason: str) -> UserError:
    return UserError(f"--input_file {input_file} cannot be read: {reason}; correct the file")


def limit_length(prompts: Sequence[Ids], max_tokens: int | None) -> list[Ids]:
    """Each prompt's last `max_tokens` tokens, as TensorRT-LLM cuts them (None: whole prompts)."""
    return [ids if max_tokens is None else ids[-max_tokens:] for ids in prompts]


def check_prompts(prompts: Sequence[Ids], where: str) -> None:
    """UserError if there is no prompt, or one without tokens; `where` names their flag."""
    if not prompts:
        raise UserError(f"{where} holds no prompt; give at least one")
    empty = next((place for place, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise UserError(f"{where}: prompt {empty} has no tokens; give at least one token")
