"""build.py --export_checkpoint and --checkpoint_dir: TensorRT-LLM's checkpoint written and read.

That engines built through it equal those built directly is shown array by array. What ModelOpt's
own exports (tests/data/quantized/modelopt-unified-*) hold is the truth for names and values.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import build as build_script
from engine.checkpoint.open import Paths, open_source
from engine.quant import QuantConfig
from engine.weights.numerics import dequantize
from tests.cli.build_runner import Finished, contents, run_here
from tests.conftest import ROOT
from tests.ft_golden import Shape, golden_files, upstream_fields, write_folder

DATA = ROOT / "tests" / "data" / "quantized"
QUIET = ("--log_level", "error", "--max_input_len", "32", "--max_output_len", "16")
# Every size is a multiple of 64 or 128 at tp 2, as 4-bit weights need.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4}


def build(*flags: str | Path) -> Finished:
    return run_here(*flags, *QUIET)


def built(*flags: str | Path) -> None:
    result = build(*flags)
    assert result.status == 0, result.stderr


def ranks(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each rank's file, engine or checkpoint."""
    files = sorted([*folder.glob("*.engine"), *folder.glob("rank*.safetensors")])
    assert files
    return [{n: t for n, t in load_file(f).items() if not n.startswith("_pad.")} for f in files]


def assert_same(one: Path, other: Path) -> None:
    """Bit-equal arrays under the same names on every rank."""
    for ours, theirs in zip(ranks(one), ranks(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory, write_hf) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    write_hf(folder, dtype=torch.bfloat16, **WIDE)
    return folder


@pytest.fixture(scope="module")
def fp8_scales(tmp_path_factory) -> Path:
    """An archive of FP8 scales for the model of `hf`."""
    path = tmp_path_factory.mktemp("scales") / "llama_tp1_rank0.npz"
    stems = ("attention:qkv:q", "attention:qkv:k", "attention:qkv:v", "attention:dense")
    stems += ("mlp:fc", "mlp:gate", "mlp:proj")
    arrays = {}
    for layer in range(WIDE["num_hidden_layers"]):
        for index, stem in enumerate(stems):
            name = f"_np:layers:{layer}:{stem}"
            arrays[f"{name}:activation_scaling_factor"] = np.float32(0.01 + 0.003 * index)
            arrays[f"{name}:weights_scaling_factor"] = np.float32(0.001 + 0.0002 * index)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def smooth(tmp_path_factory) -> Path:
    """A SmoothQuant folder with a scale of the KV cache, as TensorRT-LLM's converter writes it."""
    shape = Shape()
    files = golden_files(shape, shape.weights(), shape.ranges(), 0.5)
    return write_folder(tmp_path_factory.mktemp("sq"), files, upstream_fields(shape, 0.5))


INT4 = ("--use_weight_only", "--weight_only_precision")
MODES = {
    "full precision": ("hf", ()),
    "W8A16": ("hf", ("--use_weight_only",)),
    "W4A16": ("hf", (*INT4, "int4")),
    "FP8": ("hf", ("--enable_fp8", "--quantized_fp8_model_path", "{fp8_scales}")),
    "FP8 KV": ("hf", ("--fp8_kv_cache",)),
    "SmoothQuant per tensor": ("smooth", ("--use_smooth_quant",)),
    "SmoothQuant per channel": ("smooth", ("--use_smooth_quant", "--per_channel")),
    "SmoothQuant per token": ("smooth", ("--use_smooth_quant", "--per_token")),
    "SmoothQuant per token and channel, INT8 KV": (
        "smooth",
        ("--use_smooth_quant", "--per_token", "--per_channel", "--int8_kv_cache"),
    ),
}
# Ranks of the checkpoint, and of the engine that is built from it.
LAYOUTS = {
    "tp 1": ((1, 1), (1, 1)),
    "tp 2": ((2, 1), (1, 1)),
    "pp 2": ((1, 2), (2, 1)),
    "tp 4 of 2 KV heads": ((4, 1), (1, 2)),
}


def layout(tp: int, pp: int) -> tuple[str, ...]:
    return ("--tp_size", str(tp), "--pp_size", str(pp))


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_engines_through_the_checkpoint_are_the_same(mode, layouts, tmp_path, request):
    source, flags = MODES[mode]
    folder = request.getfixturevalue(source)
    scales = request.getfixturevalue("fp8_scales")
    given = ["--model_dir" if source == "hf" else "--ft_model_dir", folder]
    given += [flag.format(fp8_scales=scales) for flag in flags]
    exported, direct, through = (tmp_path / name for name in ("unified", "direct", "through"))
    built(*given, "--export_checkpoint", exported, *layout(*layouts[0]))
    assert len(ranks(exported)) == layouts[0][0] * layouts[0][1]
    built(*given, "--output_dir", direct, *layout(*layouts[1]))
    built("--checkpoint_dir", exported, "--output_dir", through, *layout(*layouts[1]))
    assert_same(direct, through)


@pytest.mark.parametrize("tp", [1, 2])
def test_awq_through_the_checkpoint_is_the_same(tp, tmp_path):
    """GPTQ's symmetric codes are AWQ's, without factors of the input."""
    given = ("--model_dir", DATA / "gptqmodel-gptq", *INT4, "int4_awq")
    exported, direct, through = (tmp_path / name for name in ("unified", "direct", "through"))
    built(*given, "--export_checkpoint", exported, "--tp_size", str(tp))
    built(*given, "--output_dir", direct)
    built("--checkpoint_dir", exported, "--output_dir", through)
    assert_same(direct, through)


@pytest.mark.parametrize("dim", ["0", "1"])
def test_a_cut_embedding_is_joined(hf, dim, tmp_path):
    cut = ("--use_parallel_embedding", "--embedding_sharding_dim", dim, "--tp_size", "2")
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "unified", *cut)
    rows, cols = (49, 256) if dim == "0" else (97, 128)
    for rank in ranks(tmp_path / "unified"):
        assert rank["transformer.vocab_embedding.weight"].shape == (rows, cols)
        assert rank["lm_head.weight"].shape == (49, 256), "padded to a multiple of the ranks"
    built("--model_dir", hf, "--output_dir", tmp_path / "direct")
    flags = ("--output_dir", tmp_path / "through")
    built("--checkpoint_dir", tmp_path / "unified", *flags)
    assert_same(tmp_path / "direct", tmp_path / "through")


def test_names_slices_and_config(hf, tmp_path):
    """Rank 3 of tp 2 × pp 2 against the Hugging Face tensors, cut by hand."""
    built("--model_dir", hf, "--export_checkpoint", tmp_path, *layout(2, 2))
    source = load_file(hf / "model.safetensors")
    own = ranks(tmp_path)[3]
    layer = "model.layers.3."
    q, k, v = (source[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    expected = {
        "input_layernorm.weight": source[f"{layer}input_layernorm.weight"],
        "attention.qkv.weight": torch.cat([q[128:], k[32:], v[32:]]),
        "attention.dense.weight": source[f"{layer}self_attn.o_proj.weight"][:, 128:],
        "post_layernorm.weight": source[f"{layer}post_attention_layernorm.weight"],
        "mlp.fc.weight": source[f"{layer}mlp.gate_proj.weight"][128:],
        "mlp.gate.weight": source[f"{layer}mlp.up_proj.weight"][128:],
        "mlp.proj.weight": source[f"{layer}mlp.down_proj.weight"][:, 128:],
    }
    for name, tensor in expected.items():
        assert torch.equal(own[f"transformer.layers.1.{name}"], tensor), name
    head = torch.cat([source["lm_head.weight"], torch.zeros(1, 256)])[49:]
    assert torch.equal(own["lm_head.weight"], head.bfloat16())
    assert torch.equal(own["transformer.ln_f.weight"], source["model.norm.weight"])
    assert len(own) == 2 * len(expected) + 2, "two layers, the last norm and the head"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert (config["rotary_base"], config["norm_epsilon"]) == (5e6, 1e-5)
    assert config["head_size"] == 32
    assert config["quantization"]["group_size"] == 128
    assert config["quantization"]["quant_algo"] is None
    assert not any(name.startswith("_pad") for name in load_file(tmp_path / "rank0.safetensors"))


SMOOTH = {
    "PER_TENSOR": ((), True, False),
    "PER_CHANNEL_PER_TENSOR": (("--per_channel",), True, True),
    "PER_TENSOR_PER_TOKEN": (("--per_token",), False, False),
    "PER_CHANNEL_PER_TOKEN": (("--per_token", "--per_channel"), False, True),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_quant_tensors(name, smooth, tmp_path):
    """Names and shapes of TensorRT-LLM's converter; act_scale times per_channel_scale is the
    product of the scales of input and weight."""
    flags, is_static, is_per_channel = SMOOTH[name]
    given = ("--ft_model_dir", smooth, "--use_smooth_quant", "--int8_kv_cache", *flags)
    built(*given, "--export_checkpoint", tmp_path / "unified")
    built(*given, "--output_dir", tmp_path / "engine")
    [own], [engine] = ranks(tmp_path / "unified"), ranks(tmp_path / "engine")
    config = json.loads((tmp_path / "unified" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == f"W8A8_SQ_{name}_PLUGIN"
    assert config["quantization"]["kv_cache_quant_algo"] == "INT8"
    block = {n.removeprefix("transformer.layers.1."): t for n, t in own.items() if ".1." in n}
    for linear, target in (("attention.qkv", "attn.qkv"), ("mlp.proj", "mlp.down")):
        codes, scale = engine[f"blocks.1.{target}.codes"], engine[f"blocks.1.{target}.scale"]
        assert torch.equal(block[f"{linear}.weight"], codes)
        by_row = is_per_channel or linear == "attention.qkv"
        stored = block[f"{linear}.per_channel_scale"]
        assert stored.shape == ((1, len(scale)) if by_row else (1, 1))
        if is_static:
            input_scale = engine[f"blocks.1.{target}.input_scale"]
            product = stored * block[f"{linear}.act_scale"]
            torch.testing.assert_close(product.expand(1, len(scale))[0], scale * input_scale)
    to_int8 = {"input_layernorm.scale_to_int", "post_layernorm.scale_to_int"}
    if is_static:
        input_scale = engine["blocks.1.attn.out.input_scale"]
        torch.testing.assert_close(block["attention.quantization_scaling_factor"], 1 / input_scale)
        to_int8 |= {"attention.quantization_scaling_factor", "mlp.quantization_scaling_factor"}
    else:
        assert block["input_layernorm.scale_to_int"].tolist() == [1.0]
    assert {n for n in block if "scale_to_int" in n or "quantization_scaling" in n} == to_int8
    smoothers = {n for n in block if n.endswith(".smoother")}
    assert smoothers == {"attention.dense.smoother", "mlp.proj.smoother"}
    assert torch.equal(block["mlp.proj.smoother"][0], engine["blocks.1.mlp.down.smoother"])
    assert block["attention.kv_cache_scaling_factor"].shape == (1,)


def test_cache_scales_are_merged_by_the_largest(tmp_path):
    """TensorRT-LLM has one scale for keys and values."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("config.json", "hf_quant_config.json"):
        (folder / name).write_text((DATA / "modelopt-fp8-kv" / name).read_text())
    tensors = load_file(DATA / "modelopt-fp8-kv" / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    tensors[f"{prefix}k_proj.k_scale"].fill_(0.25)
    tensors[f"{prefix}v_proj.v_scale"].fill_(0.5)
    save_file(tensors, folder / "model.safetensors")
    built("--model_dir", folder, "--export_checkpoint", tmp_path / "unified")
    [own] = ranks(tmp_path / "unified")
    assert own["transformer.layers.0.attention.kv_cache_scaling_factor"].tolist() == [0.5]


def dequantised(tensors: dict[str, Tensor], linear: str) -> Tensor:
    """A linear layer of a unified checkpoint, by the format's own rule."""
    stem = f"transformer.layers.0.{linear}"
    weight, scale = tensors[f"{stem}.weight"], tensors[f"{stem}.weights_scaling_factor"]
    if weight.dtype == torch.int8 and weight.shape[0] * 2 == scale.shape[0]:
        nibbles = torch.stack((weight << 4 >> 4, weight >> 4), dim=1).flatten(0, 1)
        groups = scale.shape[1]
        values = (nibbles.float().unflatten(1, (groups, -1)) * scale[..., None]).flatten(1)
    else:
        values = weight.float() * scale.reshape(-1, 1)
    factor = tensors.get(f"{stem}.prequant_scaling_factor")
    return values if factor is None else values * factor.float()


MODELOPT = {
    # name: (Hugging Face export, its unified sibling, largest relative error, ranks)
    "FP8": ("modelopt-fp8-kv", "modelopt-unified-fp8", 0.045, 1),
    "FP8 tp 2": ("modelopt-fp8-kv", "modelopt-unified-fp8-tp2", 0.045, 2),
    "AWQ": ("modelopt-int4-awq", "modelopt-unified-int4-awq", 0.12, 1),
    "SmoothQuant": ("modelopt-int8-sq", "modelopt-unified-int8-sq-kv", 0.0, 1),
}
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


@pytest.mark.parametrize("name", MODELOPT)
def test_agrees_with_modelopt(name, tmp_path):
    """ModelOpt's two exports of one model: its Hugging Face one, exported by us, has the names,
    dtypes and shapes of its unified one, and the same matrices. FP8 rounds q, k and v anew to one
    scale; the AWQ exports differ in what they fold into the norms."""
    source, sibling, error, world = MODELOPT[name]
    cut = ("--use_parallel_embedding", "--embedding_sharding_dim", "0", "--tp_size", str(world))
    built("--model_dir", DATA / source, "--export_checkpoint", tmp_path, *cut)
    for ours, theirs in zip(ranks(tmp_path), ranks(DATA / sibling), strict=True):
        known = {n for n in theirs if "cache_scaling" not in n}
        assert {n for n in ours if "cache_scaling" not in n} == known
        for tensor in known - {"lm_head.weight", "transformer.vocab_embedding.weight"}:
            assert ours[tensor].dtype == theirs[tensor].dtype, tensor
            assert ours[tensor].shape == theirs[tensor].shape, tensor
        for linear in LINEARS:
            norms = {"attention.qkv": "input_layernorm", "mlp.fc": "post_layernorm"}
            norms["mlp.gate"] = norms["mlp.fc"]
            one, other = (dequantised(tensors, linear) for tensors in (ours, theirs))
            if linear in norms:
                norm = f"transformer.layers.0.{norms[linear]}.weight"
                one, other = one * ours[norm].float(), other * theirs[norm].float()
            assert (one - other).norm() <= error * other.norm(), linear


@pytest.mark.parametrize("sibling", sorted({row[1] for row in MODELOPT.values()}))
def test_modelopt_checkpoints_become_engines(sibling, tmp_path):
    flags = ("--checkpoint_dir", DATA / sibling, "--output_dir", tmp_path)
    result = build(*flags)
    assert result.status == 2
    assert "its config.json has no rotary_base" in result.stderr
    built(*flags, "--rotary_base", "5e6")
    config = json.loads((tmp_path / "config.json").read_text())["engine"]
    assert config["model"]["rope"]["theta"] == 5e6
    [engine] = ranks(tmp_path)
    parts = [dequantised(rank, "mlp.proj") for rank in ranks(DATA / sibling)]
    truth = torch.cat(parts, dim=1)
    scale, codes = engine["blocks.0.mlp.down.scale"], engine["blocks.0.mlp.down.codes"]
    if codes.dtype != torch.uint8:
        smoother = engine.get("blocks.0.mlp.down.smoother", torch.ones(()))
        torch.testing.assert_close(codes.float() * scale[:, None] / smoother, truth)


def test_export_is_repeatable_and_replaces_more_ranks(hf, tmp_path):
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "a", "--tp_size", "2")
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "b")
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "a")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_failed_export_leaves_nothing(hf, tmp_path, write_hf):
    tensors = write_hf(tmp_path / "bad", **WIDE)
    tensors["lm_head.weight"][-1, -1] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "kept")
    before = contents(tmp_path / "kept")
    for folder in ("kept", "fresh"):
        result = build("--model_dir", tmp_path / "bad", "--export_checkpoint", tmp_path / folder)
        assert result.status == 2
        assert "lm_head.weight holds NaN" in result.stderr
    assert contents(tmp_path / "kept") == before
    assert not (tmp_path / "fresh").exists()


REFUSED = [
    (("--pp_size", "3"), "--pp_size 3 does not divide the model's 4 layers"),
    (("--enable_fp8",), "TensorRT-LLM's FP8 needs calibrated scales"),
    (
        ("--use_weight_only", "--quantize_lm_head"),
        "--quantize_lm_head is the torch backend's only: checkpoints for TensorRT-LLM are written",
    ),
]


@pytest.mark.parametrize("flags, message", REFUSED, ids=lambda value: str(value)[:30])
def test_refused_exports(flags, message, hf, tmp_path):
    result = build("--model_dir", hf, "--export_checkpoint", tmp_path / "out", *flags)
    assert result.status == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_dummy_weights_are_not_exported(tmp_path):
    result = build("--export_checkpoint", tmp_path / "out", "--n_layer", "2", "--n_embd", "64")
    assert result.status == 2
    assert f"--export_checkpoint {tmp_path / 'out'} needs weights to write" in result.stderr


def test_gptq_needs_the_library(tmp_path):
    out = tmp_path / "out"
    result = build("--model_dir", DATA / "gptqmodel-gptq", "--export_checkpoint", out)
    assert result.status == 2
    assert "its own operator rearranged for one class of GPU" in result.stderr
    assert "--weight_only_precision int4_awq --group_size 128" in result.stderr
    assert not out.exists()


def test_gptq_with_the_librarys_op(tmp_path, monkeypatch):
    """With an op that only packs two columns a byte: (code - 8) · scale + zero is the matrix."""

    def pack(codes_KN: Tensor) -> Tensor:
        assert codes_KN.dtype == torch.int8
        return (codes_KN[:, ::2] & 15) | (codes_KN[:, 1::2] << 4)

    operators = SimpleNamespace(
        pack_int8_tensor_to_packed_int4=pack,
        preprocess_weights_for_mixed_gemm=lambda packed, kind, dtype: packed,
    )
    monkeypatch.setattr(torch.ops, "trtllm", operators, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", ModuleType("tensorrt_llm"))
    asymmetric = DATA / "compressed-tensors-w4a16-asym"
    built("--model_dir", asymmetric, "--export_checkpoint", tmp_path)
    [own] = ranks(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["has_zero_point"]) == ("W4A16_GPTQ", True)
    stem = "transformer.layers.0.mlp.proj"
    assert own[f"{stem}.weight"].dtype == torch.float16
    assert own[f"{stem}.weight"].shape == (128, 64), "[in, out / 4]"
    packed = own[f"{stem}.weight"].view(torch.int8)
    codes = torch.stack((packed << 4 >> 4, packed >> 4), 2).flatten(1).float()
    groups = own[f"{stem}.zero"].shape[0]
    scale, zero = (
        own[f"{stem}.{name}"].float().repeat_interleave(128 // groups, 0)
        for name in ("weights_scaling_factor", "zero")
    )
    with open_source(Paths(model_dir=str(asymmetric)), QuantConfig()) as checkpoint:
        truth = dequantize(checkpoint.linear("model.layers.0.mlp.down_proj")).t()
    torch.testing.assert_close(codes * scale + zero, truth, rtol=2e-3, atol=2e-4)


def test_zero_points_have_no_awq_form(tmp_path):
    out = tmp_path / "out"
    asymmetric = DATA / "compressed-tensors-w4a16-asym"
    flags = (*INT4, "int4_awq", "--group_size", "128")
    result = build("--model_dir", asymmetric, "--export_checkpoint", out, *flags)
    assert result.status == 2
    assert "W4A16_AWQ has symmetric codes and these weights have zero points" in result.stderr


def test_other_checkpoints_are_not_overwritten(hf, tmp_path, write_hf):
    write_hf(tmp_path)
    before = contents(tmp_path)
    result = build("--model_dir", hf, "--export_checkpoint", tmp_path)
    assert result.status == 2
    assert "holds an engine or another checkpoint" in result.stderr
    assert contents(tmp_path) == before


def test_an_engine_does_not_replace_a_unified_checkpoint(hf, tmp_path):
    built("--model_dir", hf, "--export_checkpoint", tmp_path)
    result = build("--checkpoint_dir", tmp_path, "--output_dir", tmp_path)
    assert result.status == 2
    assert f"--output_dir {tmp_path} holds a checkpoint" in result.stderr


def test_flags_of_the_wrong_checkpoint(hf, tmp_path):
    built("--model_dir", hf, "--export_checkpoint", tmp_path / "unified")
    out = ("--output_dir", tmp_path / "engine")
    for flags, message in (
        (("--checkpoint_dir", hf), "is a Hugging Face checkpoint; pass it as --model_dir"),
        (("--model_dir", tmp_path / "unified"), "pass it as --checkpoint_dir"),
        (("--checkpoint_dir", tmp_path), "is no checkpoint of TensorRT-LLM's"),
        (("--checkpoint_dir", tmp_path / "gone"), "does not exist"),
        (
            ("--checkpoint_dir", tmp_path / "unified", "--model_dir", hf),
            "holds everything a build needs and --model_dir is given, too",
        ),
    ):
        result = build(*flags, *out)
        assert result.status == 2
        assert message in result.stderr, result.stderr


def test_commands_of_the_migration_page_parse():
    text = (ROOT / "docs" / "migration.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python build\.py ([^\n`\[]+)", text)
    assert len(commands) >= 2
    for command in commands:
        build_script.make_parser().parse_args(shlex.split(command))
