"""build.py's flags: the frozen list, and every refusal in one sentence with nothing written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import build
from tests.cli.build_runner import SMALL_DUMMY, contents, run_alone, run_here

# The flags of TensorRT-LLM's script for Llama and Yi up to 0.7.1, all of which parse here.
TENSORRT_FLAGS = {
    "builder_opt",
    "disable_weight_only_quant_plugin",
    "dtype",
    "embedding_sharding_dim",
    "enable_context_fmha",
    "enable_context_fmha_fp32_acc",
    "enable_debug_output",
    "enable_fp8",
    "ffn_dim_multiplier",
    "fp8_kv_cache",
    "ft_model_dir",
    "gather_all_token_logits",
    "gpus_per_node",
    "group_size",
    "hf_lora_dir",
    "hidden_act",
    "int8_kv_cache",
    "inter_size",
    "load_by_shard",
    "log_level",
    "max_batch_size",
    "max_beam_width",
    "max_input_len",
    "max_num_tokens",
    "max_output_len",
    "max_prompt_embedding_table_size",
    "meta_ckpt_dir",
    "model_dir",
    "moe_num_experts",
    "moe_renorm_mode",
    "moe_top_k",
    "moe_tp_mode",
    "multi_block_mode",
    "multiple_of",
    "n_embd",
    "n_head",
    "n_kv_head",
    "n_layer",
    "n_positions",
    "output_dir",
    "paged_kv_cache",
    "parallel_build",
    "per_channel",
    "per_group",
    "per_token",
    "pp_size",
    "quant_ckpt_path",
    "quantized_fp8_model_path",
    "remove_input_padding",
    "rms_norm_eps",
    "rotary_base",
    "rotary_scaling",
    "strongly_typed",
    "timing_cache",
    "tokens_per_block",
    "tp_size",
    "use_custom_all_reduce",
    "use_fused_mlp",
    "use_gemm_plugin",
    "use_gpt_attention_plugin",
    "use_inflight_batching",
    "use_lora_plugin",
    "use_parallel_embedding",
    "use_rmsnorm_plugin",
    "use_smooth_quant",
    "use_weight_only",
    "visualize",
    "vocab_size",
    "weight_only_precision",
    "world_size",
}
OWN_FLAGS = {
    "backend",
    "checkpoint_dir",
    "export_checkpoint",
    "help",
    "quantize_lm_head",
    "target",
    "trust_remote_code",
}


def declared() -> set[str]:
    actions = build.make_parser()._actions
    return {option[2:] for a in actions for option in a.option_strings if option[:2] == "--"}


def test_flags_are_frozen():
    """A flag is added or dropped here and in the README on purpose only."""
    assert declared() == TENSORRT_FLAGS | OWN_FLAGS


def test_every_flag_is_in_the_help():
    result = run_here("--help")
    assert result.status == 0
    assert [flag for flag in declared() if f"--{flag}" not in result.stdout] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_hf(folder, dtype=torch.bfloat16)
    return folder


def refused(result, output: Path, message: str) -> None:
    assert result.status == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("build.py: error: ")
    assert message in line
    assert not output.exists()


PLANNED = [
    # flags, part of the sentence; all against the checkpoint of 8:2 heads and 3 layers
    ("--world_size 4 --tp_size 2", "--tp_size 2 times --pp_size 1 is 2 but --world_size is 4"),
    ("--tp_size 3", "--tp_size 3 does not divide the model's 8 attention heads"),
    ("--tp_size 16", "--tp_size 16 does not divide the model's 8 attention heads"),
    ("--pp_size 4", "--pp_size 4 exceeds the model's 3 layers"),
    ("--tp_size 0", "'0' is not a whole number of at least 1"),
    ("--tp_size two", "'two' is not a whole number of at least 1"),
    (
        "--target sm_90 gtx_1080",
        "--target gtx_1080 is no GPU architecture that kernels are written for; choose from "
        "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120",
    ),
    ("--target sm_90 --export_checkpoint elsewhere", "--target sm_90 compiles kernels of the"),
    ("--meta_ckpt_dir elsewhere", "both given"),
    ("--use_weight_only --use_smooth_quant", "cannot be combined"),
    ("--use_weight_only --enable_fp8", "cannot be combined"),
    ("--use_smooth_quant --enable_fp8", "cannot be combined"),
    ("--int8_kv_cache --fp8_kv_cache", "cannot be combined"),
    ("--per_token", "--per_token belongs to --use_smooth_quant"),
    ("--per_channel", "--per_channel belongs to --use_smooth_quant"),
    ("--use_weight_only --weight_only_precision int2", "--weight_only_precision: invalid choice"),
    ("--use_inflight_batching", "--use_inflight_batching: in-flight batching is not available"),
    ("--max_prompt_embedding_table_size 8", "prompt tuning is not available"),
    ("--use_lora_plugin", "--use_lora_plugin: LoRA is not available"),
    ("--hf_lora_dir somewhere", "--hf_lora_dir: LoRA is not available"),
    ("--moe_num_experts 8", "--moe_num_experts: mixture of experts is not available"),
    ("--moe_top_k 2", "--moe_top_k: mixture of experts is not available"),
    ("--rotary_scaling cubic 2", "--rotary_scaling cubic 2: the type is linear or dynamic"),
    ("--rotary_scaling linear", "--rotary_scaling: expected 2 arguments"),
    ("--rotary_scaling linear 1", "a number above 1"),
    ("--rotary_scaling linear 0.5", "a number above 1"),
    ("--rotary_scaling dynamic two", "a number above 1"),
    ("--rotary_scaling dynamic nan", "a number above 1"),
    ("--rotary_scaling dynamic inf", "a number above 1"),
    ("--rotary_base 0", "'0' is not a number above 0"),
    ("--vocab_size 100", "--vocab_size 100 differs from the checkpoint's 97"),
    ("--n_layer 2", "--n_layer 2 differs from the checkpoint's 3"),
    ("--n_positions 512", "--n_positions 512 differs from the checkpoint's 256"),
    ("--n_embd 32", "--n_embd 32 differs from the checkpoint's 64"),
    ("--n_head 4", "--n_head 4 differs from the checkpoint's 8"),
    ("--n_kv_head 8", "--n_kv_head 8 differs from the checkpoint's 2"),
    ("--inter_size 100", "--inter_size 100 differs from the checkpoint's 96"),
    ("--hidden_act gelu", "--hidden_act gelu differs from the checkpoint's silu"),
    ("--rms_norm_eps 1e-6", "--rms_norm_eps 1e-06 differs from the checkpoint's 1e-05"),
    ("--tokens_per_block 48", "--tokens_per_block 48 must be a power of two"),
    ("--dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--embedding_sharding_dim 2", "--embedding_sharding_dim: invalid choice: 2"),
    ("--backend onnx", "--backend: invalid choice: 'onnx'"),
    ("--log_level loud", "--log_level 'loud' is unknown"),
    ("--max_input_len 0", "'0' is not a whole number of at least 1"),
    ("--model_dri x", "unknown flag --model_dri; did you mean --model_dir?"),
    ("--frobnicate", "unknown flag --frobnicate"),
    ("stray", "stray"),
]


@pytest.mark.parametrize("flags, message", PLANNED, ids=[flags for flags, _ in PLANNED])
def test_refused_before_anything_is_written(checkpoint, tmp_path, flags, message):
    output = tmp_path / "engine"
    result = run_here("--model_dir", checkpoint, "--output_dir", output, *flags.split())
    refused(result, output, message)


DUMMY = [
    ("--n_embd 100 --n_head 8", "--n_head 8 does not divide --n_embd 100"),
    ("--n_head 8 --n_kv_head 3", "8 attention heads are not a multiple of 3 KV heads"),
    ("--hidden_act gelu", "hidden_act 'gelu' is not supported"),
    ("--inter_size 50 --tp_size 4", "--tp_size 4 does not divide the model's 50 MLP channels"),
    (
        "--n_embd 36 --n_head 6 --n_kv_head 6 --inter_size 48 --tp_size 2 --pp_size 2 "
        "--world_size 3",
        "is 4 but --world_size is 3",
    ),
]


@pytest.mark.parametrize("flags, message", DUMMY, ids=[flags for flags, _ in DUMMY])
def test_refused_shapes(tmp_path, flags, message):
    output = tmp_path / "engine"
    refused(run_here("--output_dir", output, *flags.split()), output, message)


QUANT = [
    (
        "--use_weight_only --weight_only_precision int4_awq --per_group",
        "needs weights that AWQ has quantised",
    ),
    (
        "--use_weight_only --weight_only_precision int4_gptq",
        "needs weights that GPTQ has quantised",
    ),
    ("--use_smooth_quant --per_token --per_channel", "hf_yi_convert.py --smoothquant"),
    ("--use_smooth_quant --use_weight_only", "cannot be combined"),
    ("--int8_kv_cache --fp8_kv_cache", "cannot be combined: the cache has one storage type"),
    ("--int8_kv_cache", "--int8_kv_cache needs calibrated scales"),
    ("--per_token", "--per_token belongs to --use_smooth_quant"),
    ("--weight_only_precision int4", "--weight_only_precision int4 belongs to --use_weight_only"),
    ("--use_weight_only --group_size 64", "--group_size 64 belongs to --weight_only_precision"),
    ("--quant_ckpt_path x.pt", "--quant_ckpt_path x.pt is read with other quantisation flags"),
    (
        "--use_weight_only --weight_only_precision int4_awq --quant_ckpt_path gone.pt",
        "--quant_ckpt_path gone.pt does not exist",
    ),
    ("--quantized_fp8_model_path x.npz", "add --enable_fp8"),
    ("--ft_model_dir x", "--ft_model_dir x beside --model_dir gives the scales of a quantised"),
    ("--ft_model_dir x --use_smooth_quant", "leave --model_dir out"),
    ("--ft_model_dir gone --int8_kv_cache", "--ft_model_dir gone does not exist"),
]


@pytest.mark.parametrize("flags, message", QUANT, ids=[flags for flags, _ in QUANT])
def test_refused_quantisation(checkpoint, tmp_path, flags, message):
    output = tmp_path / "engine"
    result = run_here("--model_dir", checkpoint, "--output_dir", output, *flags.split())
    refused(result, output, message)


@pytest.mark.parametrize(
    "flags",
    [
        "--enable_fp8 --quantized_fp8_model_path x.npz",
        "--use_weight_only --weight_only_precision int4_awq --quant_ckpt_path x.pt",
    ],
)
def test_scales_need_a_checkpoint(tmp_path, flags):
    result = run_here("--output_dir", tmp_path / "engine", *flags.split())
    refused(result, tmp_path / "engine", "needs the full-precision checkpoint it was made from")


def test_backend_whose_library_is_not_installed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "engine"
    flags = ("--model_dir", checkpoint, "--output_dir", output, "--backend", "tensorrt_llm")
    result = run_here(*flags, "--log_level", "error")
    refused(result, output, "whose trtllm-build is not on PATH; install requirements-tensorrt.txt")
    assert "the default backend needs none of it" in result.stderr


@pytest.mark.parametrize(
    "path, message",
    [("gone", "does not exist"), ("deeper/gone", "does not exist"), ("config.json", "is a file")],
)
def test_mistyped_model_dir(checkpoint, tmp_path, path, message):
    output, given = tmp_path / "engine", checkpoint / path
    result = run_here("--model_dir", given, "--output_dir", output)
    refused(result, output, f"--model_dir {given} {message}")


def damage_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def damage_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20] ^= 0x80
    (folder / "model.safetensors").write_bytes(data)


def damage_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_bias(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_truncated, "model.safetensors: is truncated"),
        (damage_header, "model.safetensors: "),
        (damage_missing, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (damage_config, "config.json: is not valid JSON"),
        (damage_bias, "config.json: attention_bias True is a feature this network does not have"),
    ],
)
def test_damaged_checkpoint(tmp_path, write_hf, damage, message):
    folder, output = tmp_path / "checkpoint", tmp_path / "engine"
    write_hf(folder)
    damage(folder)
    refused(run_here("--model_dir", folder, "--output_dir", output), output, message)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.2.mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("tp", [1, 4])
def test_nan_weights_leave_nothing_behind(tmp_path, write_hf, name, tp):
    folder, output = tmp_path / "checkpoint", tmp_path / "engine"
    tensors = write_hf(folder)
    tensors[f"{name}.weight"][-1, -1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    flags = ("--model_dir", folder, "--output_dir", output, "--tp_size", tp)
    message = f"tensor {name}.weight holds NaN or infinite values"
    threads = set(threading.enumerate())
    refused(run_here(*flags, "--log_level", "error"), output, message)
    started = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not any(name.startswith("write ") for name in started), "writing threads ended"


def test_nan_weights_keep_the_old_engine(tmp_path, write_hf):
    folder, output = tmp_path / "checkpoint", tmp_path / "engine"
    tensors = write_hf(folder)
    flags = ("--model_dir", folder, "--output_dir", output, "--log_level", "error")
    assert run_here(*flags).status == 0
    before = contents(output)
    tensors["lm_head.weight"][-1, -1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert run_here(*flags).status == 2
    assert contents(output) == before


def test_float16_overflow_names_the_remedy(tmp_path, write_hf):
    folder, output = tmp_path / "checkpoint", tmp_path / "engine"
    tensors = write_hf(folder, dtype=torch.bfloat16)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    flags = ("--model_dir", folder, "--output_dir", output, "--log_level", "error")
    message = "more than --dtype float16 can hold; build with --dtype bfloat16 or float32"
    refused(run_here(*flags, "--dtype", "float16"), output, message)
    assert run_here(*flags, "--dtype", "bfloat16").status == 0


def test_checkpoint_is_not_overwritten(tmp_path, write_hf):
    write_hf(tmp_path)
    before = contents(tmp_path)
    result = run_here("--model_dir", tmp_path, "--output_dir", tmp_path)
    assert result.status == 2
    assert f"--output_dir {tmp_path} holds a checkpoint" in result.stderr
    assert run_here(*SMALL_DUMMY, "--output_dir", tmp_path).status == 2
    assert contents(tmp_path) == before


def test_unwritable_output_dir(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "engine"
    flags = ("--model_dir", checkpoint, "--output_dir", output, "--log_level", "error")
    refused(run_here(*flags), output, f"--output_dir {output} cannot be written (Not a directory)")


def test_refusal_in_a_shell(checkpoint, tmp_path):
    """The same through a process: status, one line, no traceback."""
    output = tmp_path / "engine"
    result = run_alone("--model_dir", checkpoint, "--output_dir", output, "--tp_size", "3")
    refused(result, output, "--tp_size 3 does not divide")
