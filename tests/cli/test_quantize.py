"""quantize.py from its flags to files that build.py takes, on a random Llama of one layer.

Truth: transformers' own model of the checkpoint with hooks, its cache, and formulas by hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quantize
from engine.checkpoint.awq_file import open_awq_file
from engine.checkpoint.gptq_file import open_gptq_file
from engine.checkpoint.hf import open_hf
from engine.quant import Algorithm, QuantConfig
from tests.cli import build_runner
from tests.cli.build_runner import Finished
from tests.conftest import ROOT
from tests.unit.engine.checkpoint.quantised_makers import dequantise, relative_error
from utils.cli import run_main
from utils.tokenizer import load_tokenizer

TINY_YI = ROOT / "models" / "tiny-yi"
LAYERS, GROUP = 1, 64
TEXT = "The module provides functions.\n\nA list is a mutable sequence of items.\n\nNo.\n"
LINEARS = {
    "self_attn.q_proj": "attention:qkv:q",
    "self_attn.k_proj": "attention:qkv:k",
    "self_attn.v_proj": "attention:qkv:v",
    "self_attn.o_proj": "attention:dense",
    "mlp.gate_proj": "mlp:fc",
    "mlp.up_proj": "mlp:gate",
    "mlp.down_proj": "mlp:proj",
}
BLOCK = "model.layers.0."


def write_model(folder: Path, **shape: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, num_hidden_layers=LAYERS, max_position_embeddings=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.mul_(4)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TINY_YI / name, folder / name)
    (folder / "texts.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("quantize") / "model",
        hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokens(model_dir) -> list[list[int]]:
    tokenizer = load_tokenizer(model_dir)
    return [tokenizer.encode(text) for text in TEXT.strip().split("\n\n")]


def run_here(*flags: str | Path) -> Finished:
    """quantize.py's whole main."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["quantize.py", *map(str, flags)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run_main(quantize.main)
    except SystemExit as end:
        return Finished(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, before)
    raise AssertionError("run_main always exits")


def quantise(model_dir: Path, *flags: str | Path) -> Finished:
    texts = model_dir / "texts.txt"
    done = run_here("--model_dir", model_dir, "--calib_dataset", texts, "--dtype=float32", *flags)
    assert done.status == 0, done.stderr
    return done


def build_as_told(done: Finished, output_dir: Path) -> dict[str, str]:
    """Run the build.py command that quantize.py printed; the engine's quantisation."""
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:2] == ["python", "build.py"]
    limits = ("--max_input_len=32", "--max_output_len=16", "--max_batch_size=2")
    built = build_runner.run_here(*words[2:], *limits, "--output_dir", output_dir)
    assert built.status == 0, built.stderr
    return json.loads((output_dir / "config.json").read_text())["engine"]["quantization"]


@torch.inference_mode()
def measure(model_dir: Path, tokens: list[list[int]]) -> tuple[dict[str, float], list[float]]:
    """Largest magnitude of each linear layer's input, and of the cached keys and values."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    inputs = dict.fromkeys(LINEARS, 0.0)

    def watch(name):
        def hook(module, args):
            inputs[name] = max(inputs[name], args[0].abs().max().item())

        return hook

    for name in LINEARS:
        model.get_submodule(BLOCK + name).register_forward_pre_hook(watch(name))
    cached = [0.0, 0.0]
    for ids in tokens:
        layer = model(torch.tensor([ids]), use_cache=True).past_key_values.layers[0]
        found = (layer.keys.abs().max().item(), layer.values.abs().max().item())
        cached = [max(pair) for pair in zip(cached, found, strict=True)]
    return inputs, cached


def test_fp8_factors_are_largest_magnitudes_over_448(tmp_path, model_dir, tokens):
    done = quantise(model_dir, "--export_path", tmp_path / "fp8")
    archive = np.load(tmp_path / "fp8" / "llama_tp1_rank0.npz")
    arrays = {name: archive[name] for name in archive.files}
    assert arrays.pop("_np:model_sizes").tolist() == [4096, 128, 192, 1, 4, 2, 32]
    inputs, cached = measure(model_dir, tokens)
    weights = load_file(model_dir / "model.safetensors")
    expected = {
        "_np:layers:0:attention:k_cache_scaling_factor": cached[0] / 448,
        "_np:layers:0:attention:v_cache_scaling_factor": cached[1] / 448,
    }
    for name, archived in LINEARS.items():
        stem = f"_np:layers:0:{archived}"
        amax = weights[f"{BLOCK}{name}.weight"].abs().max().item()
        expected[f"{stem}:activation_scaling_factor"] = inputs[name] / 448
        expected[f"{stem}:weights_scaling_factor"] = amax / 448
    assert all(array.dtype == np.float32 and array.shape == () for array in arrays.values())
    found = {name: array.item() for name, array in arrays.items()}
    assert found == pytest.approx(expected, rel=1e-5)
    description = json.loads((tmp_path / "fp8" / "llama_tp1.json").read_text())
    assert description["calibration"]["tokens"] == sum(map(len, tokens))
    assert sorted(path.name for path in (tmp_path / "fp8").iterdir()) == [
        "llama_tp1.json",
        "llama_tp1_rank0.npz",
    ]
    quant = build_as_told(done, tmp_path / "engine")
    assert (quant["algorithm"], quant["per_token"]) == ("fp8", False)


def test_fp8_into_a_file_serves_either_cache(tmp_path, model_dir):
    done = quantise(model_dir, "--qformat=fp8", "--output_dir", tmp_path / "own name.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["own name.npz"]
    command = done.stdout.splitlines()[-1]
    for flag, kv in (("--fp8_kv_cache", "fp8"), ("--int8_kv_cache", "int8")):
        told = Finished(0, f"{command} {flag}", "")
        assert build_as_told(told, tmp_path / kv)["kv"] == kv


def test_awq_state(tmp_path, model_dir):
    path = tmp_path / "tiny-4bit.pt"
    flags = ("--qformat", "int4_awq", "--awq_block_size", GROUP, "--calib_max_length", 8)
    done = quantise(model_dir, *flags, "--export_path", path)
    state = torch.load(path, weights_only=True)
    original = load_file(model_dir / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    for name in LINEARS:
        outputs, inputs = shapes[f"{BLOCK}{name}.weight"]
        shapes[f"{BLOCK}{name}.weight_quantizer._amax"] = (outputs * inputs // GROUP, 1)
        factor = f"{BLOCK}{name}.input_quantizer._pre_quant_scale"
        if factor in state:
            assert (state[factor] != 1).any(), "a factor of one is left out"
            shapes[factor] = (inputs,)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    q, k, v, _, gate, up, _ = (
        state.get(f"{BLOCK}{n}.input_quantizer._pre_quant_scale", torch.ones(1)) for n in LINEARS
    )
    assert torch.equal(q, k) and torch.equal(q, v) and torch.equal(gate, up)
    with open_awq_file(path, open_hf(model_dir), GROUP) as checkpoint:
        checkpoint.check()
        for name in LINEARS:
            weight_NK = dequantise(checkpoint.linear(BLOCK + name))
            assert relative_error(weight_NK, original[f"{BLOCK}{name}.weight"]) < 0.15
    quant = build_as_told(done, tmp_path / "engine")
    assert (quant["algorithm"], quant["group_size"]) == ("w4a16_awq", GROUP)


def test_gptq_file(tmp_path, model_dir):
    path = tmp_path / "gptq" / "llama_int4_gptq.safetensors"
    flags = ("--qformat", "int4_gptq", "--group_size", GROUP, "--batch_size", 2)
    done = quantise(model_dir, *flags, "--export_path", path.parent)
    state, original = load_file(path), load_file(model_dir / "model.safetensors")
    expected = {}
    for name, tensor in original.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith("_proj"):
            expected[name] = (torch.float16, tuple(tensor.shape))
            continue
        outputs, inputs = tensor.shape
        expected[f"{stem}.qweight"] = (torch.int32, (inputs // 8, outputs))
        expected[f"{stem}.qzeros"] = (torch.int32, (inputs // GROUP, outputs // 8))
        expected[f"{stem}.scales"] = (torch.float16, (inputs // GROUP, outputs))
        expected[f"{stem}.g_idx"] = (torch.int32, (inputs,))
        assert state[f"{stem}.g_idx"].tolist() == [place // GROUP for place in range(inputs)]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == expected
    assert torch.equal(state["lm_head.weight"], original["lm_head.weight"].half())
    with open_gptq_file(path, open_hf(model_dir), GROUP) as checkpoint:
        checkpoint.check()
        for name in LINEARS:
            weight_NK = dequantise(checkpoint.linear(BLOCK + name))
            assert relative_error(weight_NK, original[f"{BLOCK}{name}.weight"]) < 0.25
    quant = build_as_told(done, tmp_path / "engine")
    assert (quant["algorithm"], quant["group_size"]) == ("w4a16_gptq", GROUP)


@pytest.mark.parametrize(
    "qformat, quant, error",
    [
        ("int8_sq", QuantConfig(Algorithm.W8A8_SQ, per_channel=True), 0.03),
        ("int8_wo", QuantConfig(Algorithm.W8A16), 0.01),
        ("int4_wo", QuantConfig(Algorithm.W4A16_AWQ, group_size=GROUP), 0.15),
    ],
)
def test_checkpoint_directories(tmp_path, model_dir, qformat, quant, error):
    group = ("--group_size", GROUP) if quant.group_size else ()
    done = quantise(model_dir, "--qformat", qformat, *group, "--export_path", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (model_dir / name).read_bytes()
    original = load_file(model_dir / "model.safetensors")
    with open_hf(tmp_path / "made") as checkpoint, open_hf(model_dir) as base:
        checkpoint.check()
        assert checkpoint.quant == quant
        assert checkpoint.config == base.config
        for name in LINEARS:
            weight_NK = dequantise(checkpoint.linear(BLOCK + name))
            assert relative_error(weight_NK, original[f"{BLOCK}{name}.weight"]) < error
    assert build_as_told(done, tmp_path / "engine")["algorithm"] == quant.algorithm.value


def test_smoothquant_by_hand(tmp_path, model_dir, tokens):
    """The input's largest magnitude, after smoothing, over 127; xmax^0.8 / wmax^0.2 smooths."""
    quantise(model_dir, "--qformat", "int8_sq", "--export_path", tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    linear, seen = model.get_submodule(BLOCK + "self_attn.o_proj"), []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for ids in tokens:
            model(torch.tensor([ids]))
    xmax_K = torch.cat(seen).abs().amax(0)
    smoother_K = xmax_K**0.8 / linear.weight.abs().amax(0) ** 0.2
    with open_hf(tmp_path / "made") as checkpoint:
        found = checkpoint.linear(BLOCK + "self_attn.o_proj")
    torch.testing.assert_close(found.smoother_K, smoother_K.detach(), rtol=1e-3, atol=0)
    largest = (xmax_K / smoother_K).max().item()
    assert found.input_scale == pytest.approx(largest / 127, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, kv_heads, width", [(32, 4, 128), (56, 8, 896)], ids=["Yi-6B", "Yi-34B"]
)
def test_the_heads_of_yi(tmp_path, heads, kv_heads, width):
    """Grouped queries of its real numbers, 128 wide, on a narrow network."""
    model_dir = write_model(
        tmp_path / "model",
        hidden_size=width, intermediate_size=256, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128,
    )  # fmt: skip
    # The Hessian of Yi-34B's 7168 inputs alone takes longer than all else here.
    qformats = ["fp8", "int4_awq", "int8_sq", "int8_wo", "int4_wo"]
    for qformat in [*qformats, "int4_gptq"] if heads == 32 else qformats:
        done = quantise(model_dir, "--qformat", qformat, "--export_path", tmp_path / qformat)
        build_as_told(done, tmp_path / f"engine_{qformat}")


def test_int8_codes_by_hand(tmp_path, model_dir):
    """w / (largest of the row / 127), rounded."""
    quantise(model_dir, "--qformat", "int8_wo", "--export_path", tmp_path / "made")
    weight_NK = load_file(model_dir / "model.safetensors")[BLOCK + "mlp.up_proj.weight"]
    scale_N = weight_NK.abs().amax(1) / 127
    with open_hf(tmp_path / "made") as checkpoint:
        linear = checkpoint.linear(BLOCK + "mlp.up_proj")
    torch.testing.assert_close(linear.scale_N, scale_N)
    assert torch.equal(linear.codes_NK, torch.round(weight_NK / scale_N[:, None]).to(torch.int8))


def test_half_precision_on_a_cpu_is_announced(tmp_path, model_dir):
    texts = model_dir / "texts.txt"
    done = run_here(
        "--model_dir", model_dir, "--calib_dataset", texts, "--dtype", "float16", "--device", "cpu",
        "--qformat", "int4_gptq", "--group_size", GROUP, "--export_path", tmp_path / "x",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "--dtype float16 is slow on a CPU; the calibration computes in bfloat16" in done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"--group_size {GROUP} --dtype float16")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--qformat=int4_gptq", "--group_size=100"), "--group_size 100 is not supported"),
        (("--qformat=int4_awq",), "--group_size 128 does not divide the 192 inputs of .*down_proj"),
        (
            ("--calib_dataset=nowhere.txt",),
            "--calib_dataset nowhere.txt cannot be read: No such file",
        ),
        (("--export_path={model}/texts.txt/x",), "texts.txt is no directory you may write to"),
        (("--model_dir=/nowhere/yi",), "--model_dir"),
        (("--quantize_lm_head",), "--quantize_lm_head belongs to build.py, which rounds the head"),
    ],
)
def test_refusals_write_nothing(tmp_path, model_dir, flags, message):
    texts = model_dir / "texts.txt"
    done = run_here(
        "--model_dir", model_dir, "--calib_dataset", texts, "--export_path", tmp_path / "x",
        *(flag.format(model=model_dir) for flag in flags),
    )  # fmt: skip
    assert done.status == 2
    assert list(tmp_path.iterdir()) == []
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("quantize.py: error: ")]
    assert re.search(message, line)
    assert "Traceback" not in done.stderr


def test_one_process_only(model_dir):
    two = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    with (
        mock.patch.dict("os.environ", two),
        pytest.raises(quantize.UserError, match="is one process; run it without mpirun"),
    ):
        quantize.main(["--model_dir", str(model_dir)])
