"""What a run leaves behind: lines on the terminal, and files of token ids, scores and logits.

Arrays are numpy's; names and shapes of the files are those of TensorRT-LLM's run.py.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.errors import UserError
from utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from engine.session import Result

Ids = Sequence[int]


@dataclass(frozen=True)
class OutputFiles:
    """Paths of the files a run was asked for; the field names are the flags'."""

    output_csv: str | None = None
    output_npy: str | None = None
    output_logits_npy: str | None = None
    output_log_probs_npy: str | None = None
    output_cum_log_probs_npy: str | None = None

    def __bool__(self) -> bool:
        return bool(self.named())

    @property
    def has_ids(self) -> bool:
        return self.output_csv is not None or self.output_npy is not None

    @property
    def has_scores(self) -> bool:
        return self.output_log_probs_npy is not None or self.output_cum_log_probs_npy is not None

    def named(self) -> dict[str, str]:
        """Flag to path, of the files asked for."""
        values = {f"--{f.name}": getattr(self, f.name) for f in fields(self)}
        return {flag: path for flag, path in values.items() if path is not None}

    def check(self) -> None:
        """UserError unless every file can be written; makes missing folders."""
        flags: dict[Path, str] = {}
        for flag, path in self.named().items():
            twin = flags.setdefault(Path(path).resolve(), flag)
            if twin != flag:
                raise UserError(f"{twin} and {flag} name the same file {path}; name two files")
            check_writable(path, flag)


def check_writable(path: str, flag: str) -> None:
    """UserError naming `flag` unless a file can be made at `path`; makes missing folders."""
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(_temporary(path), "wb"):
            pass
        _temporary(path).unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror}); name a file in a folder that you "
            "may write to"
        ) from None


def _temporary(path: str | Path) -> Path:
    return Path(f"{path}.tmp-{os.getpid()}")


@contextmanager
def replace_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A file that appears at `path` when it is whole, and not at all after an error."""
    unfinished = _temporary(path)
    try:
        with open(unfinished, mode, **options) as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def allow_any_text() -> None:
    """Let standard output spell what its encoding lacks as \\u escapes instead of failing."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def format_result(prompt: Ids, result: Result, tokenizer: Tokenizer | None) -> list[str]:
    """The lines of one prompt: its text, then each beam's, best first. Special tokens are shown,
    and without a tokenizer the ids."""
    index = result.prompt_index
    lines = [f'Input [Text {index}]: "{_show(prompt, tokenizer)}"']
    for place, beam in enumerate(result.beams):
        lines.append(f'Output [Text {index} Beam {place}]: "{_show(beam.tokens, tokenizer)}"')
    return lines


def _show(ids: Ids, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ",".join(map(str, ids))
    return tokenizer.decode(ids, skip_special_tokens=False)


def write_files(
    files: OutputFiles, prompts: Sequence[Ids], results: Sequence[Result], *, end_id: int
) -> None:
    """Write what was asked for. Rows of ids are prompt and output, filled up with `end_id`."""
    rows = id_rows(prompts, results, end_id)
    if files.output_csv is not None:
        with replace_file(files.output_csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    if files.output_npy is not None:
        _save(files.output_npy, rows, "int32")
    if files.output_log_probs_npy is not None:
        _save(files.output_log_probs_npy, _log_probs(results), "float32")
    if files.output_cum_log_probs_npy is not None:
        scores = [[beam.cum_log_prob for beam in result.beams] for result in results]
        _save(files.output_cum_log_probs_npy, scores, "float32")
    if files.output_logits_npy is not None:
        _write_logits(files.output_logits_npy, results)


def id_rows(prompts: Sequence[Ids], results: Sequence[Result], end_id: int) -> list[list[int]]:
    """One row per prompt and beam, the beams of a prompt next to each other, all equally long."""
    rows = [
        [*prompt, *beam.tokens]
        for prompt, result in zip(prompts, results, strict=True)
        for beam in result.beams
    ]
    return _pad(rows, end_id)


def _pad(rows: Sequence[Sequence[Any]], filler: Any) -> list[list[Any]]:
    longest = max(map(len, rows))
    return [[*row, *[filler] * (longest - len(row))] for row in rows]


def _log_probs(results: Sequence[Result]) -> list[list[list[float]]]:
    """[prompts, 1, new tokens]; 0 after a prompt's last token, so that sums are right."""
    rows = _pad([result.beams[0].log_probs for result in results], 0.0)
    return [[row] for row in rows]


def _write_logits(path: str, results: Sequence[Result]) -> None:
    """<name>_context.npy: fp32 [all prompt tokens, V]; <name>_generation.npy: fp32 [prompts, 1,
    new tokens, V], 0 after a prompt's last token."""
    import numpy as np

    stem = path.removesuffix(".npy")
    context = np.concatenate([result.context_logits.numpy() for result in results])
    _save(f"{stem}_context.npy", context, "float32")
    parts = [result.generation_logits.numpy() for result in results]
    longest = max(len(part) for part in parts)
    generation = np.zeros((len(parts), 1, longest, parts[0].shape[-1]), "float32")
    for row, part in zip(generation, parts, strict=True):
        row[0, : len(part)] = part
    _save(f"{stem}_generation.npy", generation, "float32")


def _save(path: str, values: Sequence[Any] | np.ndarray, dtype: str) -> None:
    import numpy as np

    # Through a file object: np.save would add ".npy" to a name without it.
    with replace_file(path) as file:
        np.save(file, np.asarray(values, dtype), allow_pickle=False)
