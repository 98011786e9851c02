"""An `N-gpu` folder as tensors: what its config.ini says, and the files of all ranks joined.

Each file is mapped for as long as a range of rows is read, so no more than one is ever in memory.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Mapping as Names
from configparser import ConfigParser, Error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.base import TensorSource
from engine.checkpoint.ft_files import (
    CONFIG_FILE,
    DENSE,
    NORMS,
    SECTION,
    STORAGE_TYPES,
    TABLES,
    FtLinear,
    RawFile,
    cut,
)
from engine.checkpoint.meta import JoinedTensor
from engine.config import ModelConfig
from engine.errors import CheckpointError, UserError
from engine.mapping import Mapping, Span

logger = logging.getLogger("yi.ft")

# Theta of a Llama configuration that does not say it.
DEFAULT_THETA = 10000.0


class Table(TensorSource):
    """A file that holds one canonical tensor as it is."""

    def __init__(self, file: RawFile) -> None:
        self.file, self.name, self.origin = file, file.path.name, str(file.path)
        self.shape, self.dtype = file.shape, file.dtype

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        return self.file.map()[start:stop].clone()


class Columns(TensorSource):
    """Columns [span] of a file [K, N], as rows."""

    def __init__(self, file: RawFile, span: Span) -> None:
        self.file, self.name, self.origin = file, file.path.name, str(file.path)
        self.span, self.dtype = span, file.dtype
        self.shape = (span.size, file.shape[0])

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = self.row_span(start, stop)
        first = self.span.start
        columns = self.file.map()[:, first + start : first + stop]
        # Transposing what lies in one piece is several times faster.
        return columns.clone(memory_format=torch.contiguous_format).T.contiguous()


@dataclass(frozen=True)
class FtFolder:
    """An opened folder: `raw` are the fields of its config.ini, `ranks` one mapping per file."""

    path: Path
    raw: Names[str, Any]
    config: ModelConfig
    dtype: torch.dtype
    ranks: tuple[Mapping, ...]

    @property
    def is_smoothed(self) -> bool:
        """TensorRT-LLM's own folders say so by their files, too."""
        smoother = self.path / f"{DENSE.stem(0)}.smoother.0.bin"
        return self.raw.get("smoothquant") is not None or smoother.exists()

    def file(self, name: str, dtype: torch.dtype, *shape: int) -> RawFile:
        """A file whose size is right."""
        file = RawFile(self.path / name, dtype, shape)
        file.check()
        return file

    def plain(self) -> dict[str, TensorSource]:
        """Embedding, norms and head by canonical name."""
        config, layers = self.config, range(self.config.num_layers)
        tall = (config.vocab_size, config.hidden_size)
        shapes = {"vocab_embedding": tall, "lm_head": tall, "ln_f": tall[1:]}
        names = {name: (canonical, shapes[name]) for name, canonical in TABLES.items()} | {
            f"model.layers.{i}.{name}": (f"model.layers.{i}.{canonical}.weight", tall[1:])
            for i in layers
            for name, canonical in NORMS.items()
        }
        return {
            canonical: Table(self.file(f"{name}.weight.bin", self.dtype, *shape))
            for name, (canonical, shape) in names.items()
        }

    def matrices(self, row: FtLinear, stem: str, dtype: torch.dtype) -> dict[str, TensorSource]:
        """Canonical source -> its matrix [N, K] in the files `stem`.{rank}.bin."""
        found: dict[str, list[Columns]] = {source: [] for source in row.sources}
        for mapping in self.ranks:
            width = sum(cut(source, self.config, mapping).size for source in row.sources)
            inputs, outputs = self.config.hidden_size, width
            if row.is_row_parallel:
                inputs, outputs = outputs, inputs
            file = self.file(f"{stem}.{mapping.rank}.bin", dtype, inputs, outputs)
            for source, span in self._columns(row, mapping).items():
                found[source].append(Columns(file, span))
        dim = 1 if row.is_row_parallel else 0
        return {source: JoinedTensor(parts, dim) for source, parts in found.items()}

    def scales(self, row: FtLinear, layer: int, *, per_channel: bool) -> dict[str, TensorSource]:
        """Canonical source -> scales of its outputs [N, 1], or of the whole matrix [1, 1]."""
        found: dict[str, list[Columns]] = {source: [] for source in row.sources}
        is_cut = row.is_scale_cut(per_channel=per_channel)
        for mapping in self.ranks if is_cut else self.ranks[:1]:
            columns = self._columns(row, mapping)
            width = sum(cut(source, self.config, mapping).size for source in row.sources)
            if not is_cut:
                width = self.config.hidden_size if per_channel else 1
                columns = {row.sources[0]: Span(0, width)}
            name = row.scale(layer, "scale_w_quant_orig", mapping.rank, per_channel=per_channel)
            file = self.file(name, torch.float32, 1, width)
            for source, span in columns.items():
                found[source].append(Columns(file, span))
        return {source: JoinedTensor(parts, 0) for source, parts in found.items()}

    def smoother(self, row: FtLinear, layer: int) -> TensorSource:
        """What the input of a row-parallel layer is divided by, [1, K]."""
        sizes = [cut(row.sources[0], self.config, mapping).size for mapping in self.ranks]
        files = [
            self.file(f"{row.stem(layer)}.smoother.{rank}.bin", torch.float32, size, 1)
            for rank, size in enumerate(sizes)
        ]
        return JoinedTensor([Columns(file, Span(0, 1)) for file in files], 1)

    def input_scale(self, row: FtLinear, layer: int) -> TensorSource:
        name = f"{row.stem(layer)}.scale_x_orig_quant.bin"
        return Columns(self.file(name, torch.float32, 1, 1), Span(0, 1))

    def _columns(self, row: FtLinear, mapping: Mapping) -> dict[str, Span]:
        """Source -> its columns in the rank's file; without copies of what the rank before has."""
        if row.is_row_parallel:
            return {row.sources[0]: Span(0, self.config.hidden_size)}
        columns, start = {}, 0
        for source in row.sources:
            span = cut(source, self.config, mapping)
            is_copy = mapping.rank and span == cut(
                source, self.config, mapping.at(mapping.rank - 1)
            )
            if not is_copy:
                columns[source] = Span(start, start + span.size)
            start += span.size
        return columns


def open_folder(folder: Path) -> FtFolder:
    raw = _read_ini(folder)
    where = str(folder / CONFIG_FILE)
    if raw.get("rope_theta") is None and not _names_theta(raw):
        logger.warning(
            "%s: has no rope_theta; Llama's default %g is used, and --rotary_base overrides it",
            where,
            DEFAULT_THETA,
        )
    config = ModelConfig.from_hf({"model_type": "llama", **raw}, where)
    storage = raw.get("weight_data_type", "fp32")
    if storage not in STORAGE_TYPES:
        raise CheckpointError(
            f"{where}: weight_data_type {storage!r} is not one of {', '.join(STORAGE_TYPES)}; "
            "convert the model again with hf_yi_convert.py"
        )
    tp = raw.get("tensor_parallelism") or _count_ranks(folder)
    if not isinstance(tp, int) or tp < 1:
        raise CheckpointError(
            f"{where}: tensor_parallelism {tp!r} must be a positive whole number; correct the file"
        )
    mapping = Mapping(tp, 0, tp)
    try:
        mapping.check(config)
    except UserError as error:
        reason = str(error).replace("--tp_size", "tensor_parallelism")
        raise CheckpointError(f"{where}: {reason}") from None
    return FtFolder(folder, raw, config, STORAGE_TYPES[storage], tuple(mapping.ranks()))


def _names_theta(raw: Names[str, Any]) -> bool:
    """Whether the theta stands among the scaling's values, as transformers 5 has it."""
    return isinstance(raw.get("rope_parameters"), dict) and "rope_theta" in raw["rope_parameters"]


def _count_ranks(folder: Path) -> int:
    """The files of layer 0's output projection, of which every rank has one."""
    pattern = re.compile(re.escape(f"{DENSE.stem(0)}.weight.") + r"\d+\.bin")
    return sum(bool(pattern.fullmatch(path.name)) for path in folder.iterdir()) or 1


def _read_ini(folder: Path) -> dict[str, Any]:
    """The fields of config.ini; values that Python can read as its literals become these."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        inner = sorted(folder.glob(f"[0-9]*-gpu/{CONFIG_FILE}"))
        hint = f"give {inner[0].parent}" if inner else "give the N-gpu folder in its --out-dir"
        raise CheckpointError(
            f"--ft_model_dir {folder} has no {CONFIG_FILE}, so hf_yi_convert.py did not write it; "
            f"{hint}"
        )
    parser = ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), str(path))
        section = dict(parser[SECTION])
    except (OSError, UnicodeDecodeError, Error, KeyError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path}: cannot be read as an ini file with a section [{SECTION}] ({lines[0]}); "
            "convert the model again with hf_yi_convert.py"
        ) from None
    return {key: _as_literal(text) for key, text in section.items()}


def _as_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
