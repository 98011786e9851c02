"""Unified checkpoints of ModelOpt, and damaged or foreign ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.open import Paths, open_source
from engine.checkpoint.unified import open_unified
from engine.errors import CheckpointError
from engine.quant import Algorithm, KVStorage, QuantConfig
from engine.weights.numerics import dequantize
from tests.unit.engine.checkpoint.quantised_makers import DATA

LAYER = "transformer.layers.0."
CANONICAL = "model.layers.0."


def stored(name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(DATA / name / f"rank{rank}.safetensors")


def open_checked(folder: Path):
    return open_source(Paths(checkpoint_dir=str(folder)), QuantConfig())


def test_query_key_and_value_are_taken_apart():
    own = stored("modelopt-unified-fp8")
    q, k, v = own[f"{LAYER}attention.qkv.weight"].float().split([128, 64, 64])
    with open_checked(DATA / "modelopt-unified-fp8") as checkpoint:
        assert checkpoint.quant == QuantConfig(Algorithm.FP8)
        for name, part in zip("qkv", (q, k, v), strict=True):
            weights = checkpoint.linear(f"{CANONICAL}self_attn.{name}_proj")
            assert torch.equal(weights.codes_NK.float(), part)
            assert torch.equal(
                weights.scale_N[:1], own[f"{LAYER}attention.qkv.weights_scaling_factor"]
            )
        up = checkpoint.linear(f"{CANONICAL}mlp.up_proj")
        assert torch.equal(up.codes_NK.float(), own[f"{LAYER}mlp.gate.weight"].float())


def test_ranks_are_joined_to_what_one_rank_has():
    """ModelOpt's exports of one model for one rank and for two, which repeat the KV head."""
    one, two = DATA / "modelopt-unified-fp8", DATA / "modelopt-unified-fp8-tp2"
    with open_checked(one) as whole, open_checked(two) as joined:
        for name in ("q", "k", "v", "o"):
            stem = f"{CANONICAL}self_attn.{name}_proj"
            assert torch.equal(dequantize(joined.linear(stem)), dequantize(whole.linear(stem)))
        down = f"{CANONICAL}mlp.down_proj"
        assert torch.equal(dequantize(joined.linear(down)), dequantize(whole.linear(down)))
        for name, source in whole.tensors.items():
            assert torch.equal(joined.tensors[name].read(), source.read()), name


def test_awq_layers_of_one_input_get_one_factor():
    """ModelOpt gives fc and gate factors of their own; fc's is taken and gate rounded anew."""
    own = stored("modelopt-unified-int4-awq")
    factors = [own[f"{LAYER}mlp.{name}.prequant_scaling_factor"] for name in ("fc", "gate")]
    assert not torch.equal(*factors), "otherwise this shows nothing"
    with open_checked(DATA / "modelopt-unified-int4-awq") as checkpoint:
        gate = checkpoint.linear(f"{CANONICAL}mlp.gate_proj")
        up = checkpoint.linear(f"{CANONICAL}mlp.up_proj")
    assert torch.equal(gate.pre_scale_K, factors[0].float())
    assert torch.equal(up.pre_scale_K, factors[0].float())
    for weights, name, bound in ((gate, "fc", 1e-6), (up, "gate", 0.12)):
        codes = own[f"{LAYER}mlp.{name}.weight"]
        nibbles = torch.stack((codes << 4 >> 4, codes >> 4), 1).flatten(0, 1).float()
        scale = own[f"{LAYER}mlp.{name}.weights_scaling_factor"].repeat_interleave(128, 1)
        factor = own[f"{LAYER}mlp.{name}.prequant_scaling_factor"].float()
        truth = nibbles * scale * factor
        assert (dequantize(weights) - truth).norm() <= bound * truth.norm()


def test_smooth_quant_and_separate_cache_scales():
    own = stored("modelopt-unified-int8-sq-kv")
    with open_checked(DATA / "modelopt-unified-int8-sq-kv") as checkpoint:
        quant = QuantConfig(Algorithm.W8A8_SQ, per_channel=True, kv=KVStorage.INT8)
        assert checkpoint.quant == quant
        k, v = checkpoint.kv_scales(0)
        out = checkpoint.linear(f"{CANONICAL}self_attn.o_proj")
    assert torch.equal(k, own[f"{LAYER}attention.k_cache_scaling_factor"])
    assert torch.equal(v, own[f"{LAYER}attention.v_cache_scaling_factor"])
    assert not torch.equal(k, v)
    scale = own[f"{LAYER}attention.dense.weights_scaling_factor"][:, None]
    factor = own[f"{LAYER}attention.dense.prequant_scaling_factor"].float()
    truth = own[f"{LAYER}attention.dense.weight"].float() * scale * factor
    torch.testing.assert_close(dequantize(out), truth)


def test_the_merged_cache_scale_serves_both(tmp_path):
    folder = copy("modelopt-unified-int8-sq-kv", tmp_path)
    tensors = stored("modelopt-unified-int8-sq-kv")
    for name in "kv":
        del tensors[f"{LAYER}attention.{name}_cache_scaling_factor"]
    save_file(tensors, folder / "rank0.safetensors")
    with open_checked(folder) as checkpoint:
        k, v = checkpoint.kv_scales(0)
    assert k.tolist() == v.tolist() == tensors[f"{LAYER}attention.kv_cache_scaling_factor"].tolist()


def test_static_scales_with_a_range_of_the_output(tmp_path):
    """TensorRT-LLM's converters: act_scale = ymax / 127, per_channel_scale the rest."""
    folder = copy("modelopt-unified-fp8", tmp_path)
    edit(folder, quantization={"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"})
    tensors = {n: t for n, t in stored("modelopt-unified-fp8").items() if "scaling" not in n}
    generator = torch.Generator().manual_seed(0)
    input_scale, weight_scale, act_scale = 0.02, 0.003, 0.5
    for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
        shape = tensors[f"{LAYER}{name}.weight"].shape
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        tensors[f"{LAYER}{name}.weight"] = codes
        rest = torch.full((1, shape[0]), input_scale * weight_scale / act_scale)
        tensors[f"{LAYER}{name}.per_channel_scale"] = rest
        tensors[f"{LAYER}{name}.act_scale"] = torch.tensor([[act_scale]])
    for name in (
        "input_layernorm.scale_to_int",
        "post_layernorm.scale_to_int",
        "attention.quantization_scaling_factor",
        "mlp.quantization_scaling_factor",
    ):
        tensors[LAYER + name] = torch.tensor([1 / input_scale])
    save_file(tensors, folder / "rank0.safetensors")
    with open_checked(folder) as checkpoint:
        weights = checkpoint.linear(f"{CANONICAL}mlp.up_proj")
    assert weights.input_scale == pytest.approx(input_scale)
    torch.testing.assert_close(weights.scale_N, torch.full((128,), weight_scale))


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / name))


def edit(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def without_rank(folder: Path) -> None:
    (folder / "rank1.safetensors").unlink()


def with_another_rank(folder: Path) -> None:
    tensors = stored("modelopt-unified-fp8-tp2", rank=1)
    del tensors[f"{LAYER}mlp.fc.weight"]
    save_file(tensors, folder / "rank1.safetensors")


def with_another_scale(folder: Path) -> None:
    tensors = stored("modelopt-unified-fp8-tp2", rank=1)
    tensors[f"{LAYER}mlp.proj.weights_scaling_factor"] *= 2
    save_file(tensors, folder / "rank1.safetensors")


def with_more_heads(folder: Path) -> None:
    edit(folder, num_attention_heads=6)


def as_gptq(folder: Path) -> None:
    edit(folder, quantization={"quant_algo": "W4A16_GPTQ"})


def as_w4a8(folder: Path) -> None:
    edit(folder, quantization={"quant_algo": "W4A8_AWQ"})


def as_preprocessed(folder: Path) -> None:
    edit(folder, quantization={"quant_algo": "W8A16"})
    for rank in range(2):
        tensors = stored("modelopt-unified-fp8-tp2", rank)
        tensors = {n: t for n, t in tensors.items() if "scaling" not in n}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn:
                tensors[name] = tensor.view(torch.int8)
        save_file(tensors, folder / f"rank{rank}.safetensors")


def with_a_stranger(folder: Path) -> None:
    for rank in range(2):
        tensors = stored("modelopt-unified-fp8-tp2", rank)
        tensors[f"{LAYER}attention.q_layernorm.weight"] = torch.ones(4)
        save_file(tensors, folder / f"rank{rank}.safetensors")


def flattened(name: str) -> Callable[[Path], None]:
    def flatten(folder: Path) -> None:
        for rank in range(2):
            tensors = stored("modelopt-unified-fp8-tp2", rank)
            tensors[name] = tensors[name].flatten()
            save_file(tensors, folder / f"rank{rank}.safetensors")

    return flatten


def with_a_third_dimension(folder: Path) -> None:
    edit(folder, embedding_sharding_dim=2)


DAMAGES = [
    (flattened(f"{LAYER}attention.qkv.weight"), r"qkv.weight' has shape \[49152\]"),
    (flattened(f"{LAYER}attention.dense.weight"), "dense.weight' .* at least 2 dimensions"),
    (flattened("lm_head.weight"), r"'lm_head.weight' has shape \[8192\]"),
    (with_a_third_dimension, "embedding_sharding_dim 2 is neither 0 .* nor 1"),
    (without_rank, "rank1.safetensors: is missing although config.json says .* 2 ranks"),
    (with_another_rank, "rank1.safetensors: has no tensor .*mlp.fc.weight' although rank0"),
    (with_more_heads, r"attention.qkv.weight' has shape \[192, 256\] but .* 320 rows of q, k and"),
    (as_gptq, "'W4A16_GPTQ' weights were rearranged for one class of GPU"),
    (as_w4a8, "quantization.quant_algo 'W4A8_AWQ' is not supported"),
    (as_preprocessed, "'w8a16' weights were rearranged for one class of GPU"),
    (with_a_stranger, "q_layernorm.weight' is a query/key norm"),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=lambda value: str(value)[:24])
def test_refused_when_opened(damage: Callable[[Path], None], message, tmp_path):
    folder = copy("modelopt-unified-fp8-tp2", tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checked(folder)


def test_scales_that_ranks_disagree_on(tmp_path):
    folder = copy("modelopt-unified-fp8-tp2", tmp_path)
    with_another_scale(folder)
    with open_unified(folder) as checkpoint, pytest.raises(CheckpointError, match="differs from"):
        checkpoint.linear(f"{CANONICAL}mlp.down_proj")


def test_rope_base_is_known_to_be_unknown():
    """ModelOpt with transformers 5 leaves it out."""
    with open_unified(DATA / "modelopt-unified-fp8") as checkpoint:
        assert not checkpoint.is_rope_known
