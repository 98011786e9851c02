"""EngineRecord: everything needed to run an engine, as config.json keeps it."""

from __future__ import annotations

from collections.abc import Mapping as Names
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.config import ModelConfig
from engine.engine_file import SCHEMA_VERSION, FileRecord
from engine.errors import EngineError, UserError
from engine.limits import BuildLimits
from engine.mapping import Mapping
from engine.quant import INT8_KV, Algorithm, KVStorage, QuantConfig

DUMMY_NOTE = (
    "this engine has DUMMY (random) weights: it was built without a checkpoint, its output is noise"
)


class Kernels(NamedTuple):
    """A file of kernels that were compiled at build, for which GPU architectures, and by which
    version and build of Triton: another one compiles its own."""

    file: FileRecord
    targets: tuple[str, ...]
    triton: str
    compiler: str

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "file": self.file._asdict()}

    @classmethod
    def from_dict(cls, values: Names[str, Any]) -> Kernels:
        file, targets = FileRecord(**values["file"]), tuple(values["targets"])
        return cls(file, targets, values["triton"], values["compiler"])


@dataclass(frozen=True)
class EngineRecord:
    """What an engine is: model, storage, parallel layout, limits, files.

    `mapping` is rank 0's; `embedding_dim` is the sharded dimension of the embedding table or
    None; `generation` holds token ids and sampling defaults of the checkpoint; `source` says
    where the weights came from and `is_dummy` that they are random.
    """

    config: ModelConfig
    dtype: str
    quant: QuantConfig
    mapping: Mapping
    limits: BuildLimits
    layout_version: int
    backend: str = "torch"
    embedding_dim: int | None = None
    generation: Names[str, Any] = field(default_factory=dict)
    source: str = ""
    is_dummy: bool = False
    files: tuple[FileRecord, ...] = ()
    kernels: Kernels | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that every run has to repeat to its user."""
        return (DUMMY_NOTE,) if self.is_dummy else ()

    def to_dict(self) -> dict[str, Any]:
        """The `engine` section of config.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "layout_version": self.layout_version,
            "backend": self.backend,
            "model": self.config.to_dict(),
            "dtype": self.dtype,
            "quantization": self.quant.to_dict(),
            "mapping": {"world": self.mapping.world, "tp": self.mapping.tp, "pp": self.mapping.pp},
            "limits": self.limits.to_dict(),
            "embedding_dim": self.embedding_dim,
            "generation": dict(self.generation),
            "source": self.source,
            "is_dummy": self.is_dummy,
            "files": [file._asdict() for file in self.files],
            **({"kernels": self.kernels.to_dict()} if self.kernels else {}),
        }

    @classmethod
    def from_dict(cls, values: Names[str, Any], where: str) -> EngineRecord:
        """Inverse of `to_dict`; EngineError naming `where` for a damaged section."""
        try:
            record = cls(
                config=ModelConfig.from_dict(values["model"]),
                dtype=values["dtype"],
                quant=QuantConfig.from_dict(values["quantization"]),
                mapping=Mapping(rank=0, **values["mapping"]),
                limits=BuildLimits.from_dict(values["limits"]),
                layout_version=values["layout_version"],
                backend=values["backend"],
                embedding_dim=values["embedding_dim"],
                generation=values["generation"],
                source=values["source"],
                is_dummy=values["is_dummy"],
                files=tuple(FileRecord(**file) for file in values["files"]),
                kernels=Kernels.from_dict(found) if (found := values.get("kernels")) else None,
            )
            if len(record.files) != record.mapping.world:
                raise ValueError(f"{len(record.files)} files, {record.mapping.world} ranks")
            return record
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise EngineError(
                f"{where}: the 'engine' section is damaged ({error!r}); build the engine again"
            ) from None

    def builder_config(self, *, parallel_build: bool) -> dict[str, Any]:
        """The seed's `builder_config` section, for programs that read TensorRT-LLM's."""
        config, limits = self.config, self.limits
        int8 = self.quant.algorithm in (Algorithm.W8A16, Algorithm.W8A8_SQ)
        return {
            "name": "yi",
            "precision": self.dtype,
            "tensor_parallel": self.mapping.tp,
            "pipeline_parallel": self.mapping.pp,
            "parallel_build": parallel_build,
            "use_refit": False,
            "int8": int8 or bool(self.quant.quant_mode & INT8_KV),
            "fp8": self.quant.algorithm is Algorithm.FP8 or self.quant.kv is KVStorage.FP8,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "hidden_size": config.hidden_size,
            "inter_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "hidden_act": config.hidden_act,
            "max_position_embeddings": config.max_positions,
            "rotary_base": config.rope.theta,
            "rms_norm_eps": config.rms_norm_eps,
            "max_batch_size": limits.max_batch_size,
            "max_input_len": limits.max_input_len,
            "max_output_len": limits.max_output_len,
            "max_num_tokens": limits.max_num_tokens,
            "max_beam_width": limits.max_beam_width,
            "quant_mode": self.quant.quant_mode,
            "group_size": self.quant.group_size,
            "max_prompt_embedding_table_size": 0,
            "gather_all_token_logits": limits.gather_all_token_logits,
        }
