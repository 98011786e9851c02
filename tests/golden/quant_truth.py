"""A transformers model that computes what a quantised engine should: the engine file's arrays
dequantised by hand, activations and cached keys and values rounded in hooks.

Reads engine files with safetensors and knows their arrays (engine/weights/pack.py), no engine code.

Dimensions: N outputs, K inputs, R groups along K, T tokens, G kv heads, D head size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from tests.golden.truth import TINY_YI, load_model

INT8_MAX, FP8_MAX = 127, 448.0
LEAST_RANGE = 1e-6
ROW_PARALLEL = ("attn.out", "mlp.down")
Arrays = dict[str, Tensor]


class QuantisedTruth:
    """tiny-yi with the weights of a one-rank engine, as transformers computes it in fp32.

    `parts`: ranks among which tensor parallelism cuts the inputs of o_proj and down_proj; a scale
    found at run time is then each rank's own.
    """

    def __init__(self, engine_dir: Path, parts: int = 1):
        self._parts = parts
        config = json.loads((engine_dir / "config.json").read_text())["engine"]
        [file] = config["files"]
        self._arrays = load_file(engine_dir / file["name"])
        self._quant = config["quantization"]
        self.model: PreTrainedModel = copy.deepcopy(load_model(TINY_YI))
        for index, layer in enumerate(self.model.model.layers):
            self._replace(layer, f"blocks.{index}.")
        head_VE = dequantise(self._at("head."))
        self.model.lm_head.weight = nn.Parameter(head_VE, requires_grad=False)

    def _replace(self, layer: nn.Module, prefix: str) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        for name, modules in (
            ("attn.qkv", (attention.q_proj, attention.k_proj, attention.v_proj)),
            ("attn.out", (attention.o_proj,)),
            ("mlp.gate_up", (mlp.gate_proj, mlp.up_proj)),
            ("mlp.down", (mlp.down_proj,)),
        ):
            arrays = self._at(f"{prefix}{name}.")
            weight_NK = dequantise(arrays)
            weights = weight_NK.split([module.out_features for module in modules])
            for module, weight in zip(modules, weights, strict=True):
                module.weight = nn.Parameter(weight.clone(), requires_grad=False)
                parts = self._parts if name in ROW_PARALLEL else 1
                module.register_forward_pre_hook(_rounding(arrays, self._quant, parts))
        norms = (("attn_norm", layer.input_layernorm), ("mlp_norm", layer.post_attention_layernorm))
        for name, norm in norms:
            norm.weight = nn.Parameter(self._arrays[f"{prefix}{name}.weight"].float())
        if self._quant["kv"] != "none":
            scale_G = self._arrays[f"{prefix}attn.kv_scale"][1]
            attention.v_proj.register_forward_hook(
                lambda module, inputs, v: _round_heads(v, scale_G, self._quant["kv"])
            )

    def _at(self, prefix: str) -> Arrays:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self._arrays.items()
            if name.startswith(prefix)
        }

    @contextmanager
    def _keys_rounded(self) -> Iterator[None]:
        """Keys are rounded after their rotation, as they are cached; layers come in order."""
        if self._quant["kv"] == "none":
            yield
            return
        layers = self.model.config.num_hidden_layers
        scales = [self._arrays[f"blocks.{i}.attn.kv_scale"][0] for i in range(layers)]
        original, calls = modeling_llama.apply_rotary_pos_emb, 0

        def rotate(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
            nonlocal calls
            scale_G, calls = scales[calls % layers], calls + 1
            q, k = original(q, k, *rest, **options)
            return q, fake(k, scale_G[:, None, None], self._quant["kv"])

        modeling_llama.apply_rotary_pos_emb = rotate
        try:
            yield
        finally:
            modeling_llama.apply_rotary_pos_emb = original
            assert calls and calls % layers == 0

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> Tensor:
        """Logits fp32 [T, V] at every position."""
        with self._keys_rounded():
            return self.model(torch.tensor([tokens])).logits[0].float()


def dequantise(arrays: Arrays) -> Tensor:
    """fp32 [N, K], the factor of the input left out."""
    if "weight" in arrays:
        return arrays["weight"].float()
    codes, scale = arrays["codes"], arrays["scale"].float()
    if codes.dtype != torch.uint8:
        return codes.float() * scale[:, None]
    group = 2 * codes.shape[1] if scale.ndim == 1 else 2 * codes.shape[1] // scale.shape[1]
    block = 64 if group % 64 == 0 else 32
    values_NK = torch.empty(len(codes), 2 * codes.shape[1])
    for column in range(values_NK.shape[1]):
        start, place = divmod(column, block)
        byte_N = codes[:, start * (block // 2) + place % (block // 2)]
        values_NK[:, column] = (byte_N >> 4 if place >= block // 2 else byte_N & 15).float()
    if scale.ndim == 1:
        return (values_NK - 8) * scale[:, None]
    zero_NR = arrays["zero"].float() if "zero" in arrays else torch.full_like(scale, 8)
    spread = [x.repeat_interleave(group, dim=1) for x in (zero_NR, scale)]
    return (values_NK - spread[0]) * spread[1]


def _rounding(arrays: Arrays, quant: dict[str, Any], parts: int) -> Callable[..., tuple[Tensor]]:
    """What the engine does to a layer's input before the product, as a forward pre-hook."""
    kind = {"w8a8_sq": "int8", "fp8": "fp8"}.get(quant["algorithm"])

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0]
        if "pre_scale" in arrays:
            x = x * arrays["pre_scale"]
        if "smoother" in arrays:
            x = x / arrays["smoother"]
        if kind is None:
            return (x,)
        scale = arrays.get("input_scale")
        if scale is None:
            largest = {"int8": INT8_MAX, "fp8": FP8_MAX}[kind]
            pieces = x.unflatten(-1, (parts, -1))
            scale = pieces.abs().amax(-1, keepdim=True).clamp(min=LEAST_RANGE) / largest
            return (fake(pieces, scale, kind).flatten(-2),)
        return (fake(x, scale, kind),)

    return hook


def _round_heads(v: Tensor, scale_G: Tensor, kind: str) -> Tensor:
    heads = v.unflatten(-1, (len(scale_G), -1))
    return fake(heads, scale_G[:, None], kind).flatten(-2)


def fake(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """x rounded to codes of `kind` and back."""
    if kind == "int8":
        return (x / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
