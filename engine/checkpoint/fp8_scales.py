"""FP8 scaling factors beside a full-precision checkpoint: the .npz of --quantized_fp8_model_path.

Written by quantize.py, and by NVIDIA's AMMO before it, whose archives also hold the weights; of
those only the shapes are looked at.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.base import Checkpoint, KVPair, TensorSource
from engine.checkpoint.linear_layers import find_peers, linear_shapes
from engine.checkpoint.npz_file import NpzFile
from engine.checkpoint.quant_scales import SCALE_DTYPES, read_largest, read_scale
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant import KVStorage
from engine.weights.types import Dense

PREFIX = "_np:layers"
# The names follow TensorRT-LLM, where mlp.fc is the gate projection and mlp.gate the up projection.
LINEAR_NAMES = {
    "self_attn.q_proj": "attention:qkv:q",
    "self_attn.k_proj": "attention:qkv:k",
    "self_attn.v_proj": "attention:qkv:v",
    "self_attn.o_proj": "attention:dense",
    "mlp.gate_proj": "mlp:fc",
    "mlp.up_proj": "mlp:gate",
    "mlp.down_proj": "mlp:proj",
}
INPUT, WEIGHT = "activation_scaling_factor", "weights_scaling_factor"
# Ours: one factor for the cached keys of a layer and one for its values.
KV_NAMES = ("attention:k_cache_scaling_factor", "attention:v_cache_scaling_factor")
# Ours: the sizes of the model that the factors belong to, int64 in the order of `model_sizes`.
SIZES = "_np:model_sizes"
ONE_VALUE = ((), (1,))

_LINEAR_STEM = re.compile(r"model\.layers\.(\d+)\.(.+)")
_REMEDY = "run quantize.py --qformat fp8 on the checkpoint of --model_dir"


def factor_name(stem: str, kind: str) -> str:
    """The array of the linear layer `stem`; `kind` is INPUT or WEIGHT."""
    match = _LINEAR_STEM.fullmatch(stem)
    assert match, stem
    return f"{PREFIX}:{match[1]}:{LINEAR_NAMES[match[2]]}:{kind}"


def kv_names(layer: int) -> tuple[str, str]:
    """The arrays of the scales of a layer's cached keys and values."""
    return f"{PREFIX}:{layer}:{KV_NAMES[0]}", f"{PREFIX}:{layer}:{KV_NAMES[1]}"


def model_sizes(config: ModelConfig) -> tuple[int, ...]:
    """What tells models apart whose factors have the same names."""
    return (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )


class Fp8ScaledCheckpoint(Checkpoint):
    """The tensors of `base` with the factors of an archive; closing it closes both.

    Layers with one input share its factor, and q, k and v also that of their weights: the largest.
    """

    def __init__(self, base: Checkpoint, path: Path, factors: NpzFile, resources: ExitStack):
        super().__init__(
            f"{base.where} with {path}",
            base.config,
            base.tensors,
            generation=base.generation,
            dropped=base.dropped,
            resources=resources,
        )
        # As they are, since a head that is tied to the embedding is tied already.
        self.tensors, self.leftovers = base.tensors, base.leftovers
        self._factors = factors.tensors
        if kv_names(0)[0] in self._factors:
            self.kv_storage = KVStorage.FP8

    def linear(self, stem: str) -> Dense:
        dense = super().linear(stem)
        assert isinstance(dense, Dense)
        inputs = find_peers(stem)
        # Outputs of gate and up keep their own scales when the two are joined.
        weights = inputs if ".self_attn." in stem else (stem,)
        return replace(
            dense,
            input_scale=read_largest(self._factors[factor_name(peer, INPUT)] for peer in inputs),
            weight_scale=read_largest(self._factors[factor_name(peer, WEIGHT)] for peer in weights),
        )

    def kv_scales(self, layer: int) -> KVPair | None:
        if self.kv_storage is KVStorage.NONE:
            return None
        k_scale, v_scale = (read_scale(self._factors[n]).reshape(-1) for n in kv_names(layer))
        return k_scale, v_scale


def open_fp8_scales(path: Path, base: Checkpoint) -> Fp8ScaledCheckpoint:
    """The model of `base` with the factors in `path`, an archive or a directory that holds one.

    Raises CheckpointError for a quantised `base`, for factors of another model and for factors
    that are missing or cannot be right; the caller then closes `base`. Reads no weights.
    """
    flag = f"--quantized_fp8_model_path {path}"
    if base.quant is not None:
        raise CheckpointError(
            f"{flag} cannot be combined with {base.where}, which is quantised already; name the "
            "full-precision checkpoint the file was made from as --model_dir"
        )
    path = _find_archive(path, flag)
    with ExitStack() as stack:
        file = stack.enter_context(closing(NpzFile(path)))
        _check_model(file, base.config)
        _check_factors(file, base.config)
        resources = stack.pop_all()
        resources.callback(base.close)
        return Fp8ScaledCheckpoint(base, path, file, resources)


def _find_archive(path: Path, flag: str) -> Path:
    if not path.exists():
        raise CheckpointError(f"{flag} does not exist; {_REMEDY}")
    if not path.is_dir():
        return path
    archives = sorted(path.glob("*.npz"))
    if len(archives) != 1:
        raise CheckpointError(
            f"{flag} holds {len(archives)} .npz files; give the one to read, whose factors serve "
            "any --tp_size"
        )
    return archives[0]


def _check_model(file: NpzFile, config: ModelConfig) -> None:
    """Raise CheckpointError if the archive belongs to a model of other sizes."""
    found = re.compile(rf"{PREFIX}:(\d+):.*{INPUT}")
    layers = {int(match[1]) for match in map(found.fullmatch, file.tensors) if match}
    if not layers:
        raise CheckpointError(f"{file.path} holds no FP8 scaling factors; {_REMEDY}")
    if len(layers) != config.num_layers or max(layers) >= config.num_layers:
        raise CheckpointError(
            f"{file.path} has scaling factors for {len(layers)} layers (up to layer "
            f"{max(layers)}) but the model has {config.num_layers}; {_REMEDY}"
        )
    if SIZES in file.tensors:
        sizes = tuple(file.tensors[SIZES].read().reshape(-1).tolist())
        if sizes != model_sizes(config):
            raise CheckpointError(
                f"{file.path} belongs to a model of the sizes {list(sizes)} (vocabulary, hidden, "
                f"MLP, layers, heads, KV heads, head size) but --model_dir is one of "
                f"{list(model_sizes(config))}; {_REMEDY}"
            )
    for stem, shape in linear_shapes(config).items():
        weight = file.tensors.get(factor_name(stem, "weight"))
        if weight is not None and weight.shape != shape:
            raise CheckpointError(
                f"{file.path}: {weight.name} has shape {list(weight.shape)} but the model's "
                f"{stem} has {list(shape)}, so the file belongs to another model; {_REMEDY}"
            )


def _check_factors(file: NpzFile, config: ModelConfig) -> None:
    """Raise CheckpointError unless all factors are there and are single sound values."""
    names = [factor_name(s, kind) for s in linear_shapes(config) for kind in (INPUT, WEIGHT)]
    for name in names:
        read_scale(_require(file, name))
    kv = [name for layer in range(config.num_layers) for name in kv_names(layer)]
    if any(name in file.tensors for name in kv):
        for name in kv:
            read_scale(_require(file, name))


def _require(file: NpzFile, name: str) -> TensorSource:
    """The factor `name`, still unread."""
    source = file.tensors.get(name)
    if source is None:
        raise CheckpointError(f"{file.path} has no array {name}; {_REMEDY}")
    if source.shape not in ONE_VALUE or source.dtype not in SCALE_DTYPES:
        kind = str(source.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file.path}: array {name} is {kind} {list(source.shape)} where one floating-point "
            f"value is needed; {_REMEDY}"
        )
    return source
