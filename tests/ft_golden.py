"""The files of an N-gpu folder, computed with numpy alone from what the format says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """Sizes of a small network; `tp` files per matrix."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 6
    hidden: int = 40
    ffn: int = 56
    vocab: int = 51
    layers: int = 2
    tp: int = 1

    def hf(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5000000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    def weights(self, seed: int = 0) -> Arrays:
        """Random fp32 weights under Hugging Face's names."""
        rng = np.random.default_rng(seed)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }
        shapes = {"model.embed_tokens": (self.vocab, self.hidden), "model.norm": (self.hidden,)}
        shapes["lm_head"] = (self.vocab, self.hidden)
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        return {
            f"{name}.weight": _draw(rng, shape, is_norm="norm" in name)
            for name, shape in shapes.items()
        }

    def ranges(self, seed: int = 1) -> list[dict[str, Any]]:
        """Made-up activation ranges of each layer; layers with one input share its range."""
        rng = np.random.default_rng(seed)
        sizes = (
            (("q_proj", "k_proj", "v_proj"), self.hidden),
            (("o_proj",), self.heads * self.head_dim),
            (("gate_proj", "up_proj"), self.hidden),
            (("down_proj",), self.ffn),
        )
        found = []
        for _ in range(self.layers):
            x, y = {}, {}
            for names, size in sizes:
                shared = rng.uniform(0.1, 20, size).astype(np.float32)
                x |= dict.fromkeys(names, shared)
                y |= {name: np.float32(rng.uniform(1, 50)) for name in names}
            k, v = rng.uniform(1, 9, (2, self.kv_heads)).astype(np.float32)
            found.append({"x": x, "y": y, "k": k, "v": v})
        return found


def _draw(rng: np.random.Generator, shape: tuple[int, ...], *, is_norm: bool) -> np.ndarray:
    values = rng.uniform(0.5, 1.5, shape) if is_norm else rng.normal(0, 0.1, shape)
    return values.astype(np.float32)


def smooth_layer(
    weights: Arrays, x: Mapping[str, np.ndarray], alpha: float
) -> tuple[Arrays, Mapping[str, np.ndarray], dict[str, np.ndarray]]:
    """(weights, input ranges, smoothers) of one layer, names without prefix, after SmoothQuant."""
    weights, ranges, smoothers = dict(weights), {}, {}
    for names, norm in (
        (("q_proj", "k_proj", "v_proj"), "input_layernorm"),
        (("o_proj",), None),
        (("gate_proj", "up_proj"), "post_attention_layernorm"),
        (("down_proj",), None),
    ):
        w_max = np.max([np.abs(weights[name]).max(axis=0) for name in names], axis=0)
        s = np.maximum(x[names[0]] ** alpha / np.maximum(w_max, 1e-5) ** (1 - alpha), 1e-5)
        s = s.astype(np.float32)
        for name in names:
            weights[name] = weights[name] * s
            ranges[name] = x[name] / s
            smoothers[name] = s
        if norm:
            weights[norm] = weights[norm] / s
    return weights, ranges, smoothers


def golden_files(
    shape: Shape, weights: Arrays, ranges: list[dict[str, Any]], alpha: float | None = None
) -> Arrays:
    """File name → array, fp32 storage. Without `alpha` int8 only for q, k and v."""
    files = {
        "vocab_embedding.weight.bin": weights["model.embed_tokens.weight"],
        "lm_head.weight.bin": weights["lm_head.weight"],
        "ln_f.weight.bin": weights["model.norm.weight"],
    }
    for layer, found in enumerate(ranges):
        prefix = f"model.layers.{layer}."
        own = {
            name.removesuffix(".weight").split(".")[-1]: array
            for name, array in weights.items()
            if name.startswith(prefix)
        }
        x, smoothers = found["x"], {}
        if alpha is not None:
            own, x, smoothers = smooth_layer(own, x, alpha)
        layer_files = _layer_files(shape, own, x, found["y"], has_all=alpha is not None)
        if alpha is not None:
            for stem, name in (("attention.dense", "o_proj"), ("mlp.proj", "down_proj")):
                for rank, part in enumerate(np.split(smoothers[name], shape.tp)):
                    layer_files[f"{stem}.smoother.{rank}.bin"] = part
        files |= {prefix + name: array for name, array in layer_files.items()}
    return files


def cache_files(ranges: list[dict[str, Any]]) -> Arrays:
    """The files that TensorRT-LLM's converter does not write."""
    files = {}
    for layer, found in enumerate(ranges):
        for which in "kv":
            stem = f"model.layers.{layer}.attention.{which}_cache.scale_quant_orig"
            files[f"{stem}.bin"] = found[which].max(keepdims=True) / np.float32(127)
            files[f"{stem}.head.bin"] = found[which] / np.float32(127)
    return files


def _layer_files(shape: Shape, own: Arrays, x: Mapping, y: Mapping, *, has_all: bool) -> Arrays:
    files = {
        "input_layernorm.weight.bin": own["input_layernorm"],
        "post_layernorm.weight.bin": own["post_attention_layernorm"],
    }
    for stem, names, axis in (
        ("attention.query_key_value", ("q_proj", "k_proj", "v_proj"), 0),
        ("attention.dense", ("o_proj",), 1),
        ("mlp.fc", ("gate_proj",), 0),
        ("mlp.gate", ("up_proj",), 0),
        ("mlp.proj", ("down_proj",), 1),
    ):
        matrices = [own[name] for name in names]
        for rank, part in enumerate(_ranks(shape, names, matrices, axis)):
            files[f"{stem}.weight.{rank}.bin"] = part.T
        if has_all or len(names) == 3:
            x_max, y_max = x[names[0]].max(), max(y[name] for name in names)
            files |= _int8_files(shape, stem, names, matrices, axis, x_max, y_max)
    return files


def _int8_files(shape, stem, names, matrices, axis, x_max, y_max) -> Arrays:
    one = np.float32
    files = {
        f"{stem}.scale_x_orig_quant.bin": one(127) / x_max,
        f"{stem}.scale_y_quant_orig.bin": y_max / one(127),
    }
    for kind in ("", "col."):
        scales = [np.abs(w).max(axis=1) / one(127) for w in matrices]
        if not kind:
            scales = [np.full_like(s, s.max()) for s in scales]
        codes = [
            np.clip(np.round(w / s[:, None]), -127, 127).astype(np.int8)
            for w, s in zip(matrices, scales, strict=True)
        ]
        for rank, part in enumerate(_ranks(shape, names, codes, axis)):
            files[f"{stem}.weight.int8.{kind}{rank}.bin"] = part.T
        stored: dict[str, np.ndarray] = {}
        if len(names) == 3 or (kind and axis == 0):
            stored = {f"{r}.": part for r, part in enumerate(_ranks(shape, names, scales, 0))}
        else:
            stored = {"": scales[0] if kind else scales[0][:1]}
        for rank, scale in stored.items():
            w_max = scale * one(127)
            files[f"{stem}.scale_w_quant_orig.{kind}{rank}bin"] = scale
            accumulated = (one(127) / y_max) / ((one(127) / x_max) * (one(127) / w_max))
            files[f"{stem}.scale_y_accum_quant.{kind}{rank}bin"] = accumulated
    return files


def _ranks(shape: Shape, names, arrays, axis: int) -> list[np.ndarray]:
    """What each rank holds: its share of every array, joined; KV heads repeated if too few."""
    shares = []
    for name, array in zip(names, arrays, strict=True):
        if name in ("k_proj", "v_proj") and shape.tp > shape.kv_heads:
            heads = np.split(array, shape.kv_heads)
            shares.append([head for head in heads for _ in range(shape.tp // shape.kv_heads)])
        else:
            shares.append(np.split(array, shape.tp, axis=axis))
    return [np.concatenate(parts) for parts in zip(*shares, strict=True)]


def write_folder(folder: Path, files: Arrays, fields: Mapping[str, Any]) -> Path:
    """The files and a config.ini, as TensorRT-LLM's converter writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in files.items():
        np.ascontiguousarray(array).tofile(folder / name)
    lines = [f"{name} = {value}" for name, value in fields.items()]
    (folder / "config.ini").write_text("\n".join(["[llama]", *lines, ""]))
    return folder


def upstream_fields(shape: Shape, alpha: float | None = None) -> dict[str, Any]:
    """What TensorRT-LLM's converter writes to config.ini; model_type is no field of its."""
    hf = {name: value for name, value in shape.hf().items() if name != "model_type"}
    return {
        "out_dir": "out",
        "in_file": "Yi-6B",
        "tensor_parallelism": shape.tp,
        "processes": 4,
        "calibrate_kv_cache": alpha is None,
        "smoothquant": alpha,
        "model": "llama",
        "storage_type": "fp32",
        **hf,
        "rope_scaling": None,
        "weight_data_type": "fp32",
        "multi_query_mode": True,
    }
