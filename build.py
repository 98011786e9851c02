#!/usr/bin/env python3
"""Turn a checkpoint into an engine: one file per rank, plus config.json."""

from __future__ import annotations

import signal
import sys
from argparse import Namespace
from types import FrameType

from engine.limits import BuildLimits
from utils import log
from utils.cli import Parser, positive_float, positive_int, run_main

PLUGIN_TYPES = ("float16", "bfloat16", "float32")


def make_parser() -> Parser:
    parser = Parser(prog="build.py", description=__doc__)
    _add_source_flags(parser)
    _add_parallel_flags(parser)
    _add_limit_flags(parser)
    _add_quant_flags(parser)
    _add_shape_flags(parser)
    _add_switches(parser)
    _add_later_flags(parser)
    return parser


def _add_source_flags(parser: Parser) -> None:
    group = parser.add_argument_group("source and destination")
    group.add_argument(
        "--model_dir",
        metavar="DIR",
        help="Hugging Face checkpoint: a folder or a hub id such as 01-ai/Yi-6B",
    )
    group.add_argument("--meta_ckpt_dir", metavar="DIR", help="checkpoint in Meta's format (.pth)")
    group.add_argument(
        "--ft_model_dir",
        metavar="DIR",
        help="folder written by hf_yi_convert.py (…/N-gpu): INT8 weights and KV cache scales",
    )
    group.add_argument(
        "--checkpoint_dir",
        metavar="DIR",
        help="TensorRT-LLM's unified checkpoint (config.json and rank0.safetensors …), of "
        "convert_checkpoint.py, ModelOpt or --export_checkpoint",
    )
    group.add_argument(
        "--quant_ckpt_path", metavar="FILE", help="AWQ .pt/.npz or GPTQ .safetensors/.pt weights"
    )
    group.add_argument(
        "--quantized_fp8_model_path", metavar="FILE", help=".npz with FP8 scaling factors"
    )
    group.add_argument(
        "--output_dir", metavar="DIR", default="engine_outputs", help="default: %(default)s"
    )
    group.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="type of weights and activations (default: %(default)s)",
    )
    group.add_argument(
        "--backend",
        default="torch",
        choices=("torch", "tensorrt_llm"),
        help="what runs the engine; tensorrt_llm needs NVIDIA's library and its trtllm-build "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="ARCH",
        help="GPU architectures such as sm_90 (Hopper) to compile the kernels for, so that the "
        "first run there has less to compile; needs no GPU, and the versions of Triton and Python "
        "that run the engine",
    )
    group.add_argument(
        "--export_checkpoint",
        metavar="DIR",
        help="write TensorRT-LLM's unified checkpoint for trtllm-build and stop; needs no library",
    )
    group.add_argument("--log_level", default="info", help="error, warning, info, verbose or debug")
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="recorded for the tokenizer; no code from a checkpoint is ever run by a build",
    )


def _add_parallel_flags(parser: Parser) -> None:
    group = parser.add_argument_group("parallelism")
    group.add_argument(
        "--world_size",
        type=positive_int,
        help="number of ranks and engine files (default: tp_size times pp_size)",
    )
    group.add_argument("--tp_size", type=positive_int, default=1, help="tensor-parallel ways")
    group.add_argument("--pp_size", type=positive_int, default=1, help="pipeline-parallel ways")
    group.add_argument(
        "--parallel_build", action="store_true", help="write the ranks in parallel processes"
    )
    group.add_argument(
        "--use_parallel_embedding",
        action="store_true",
        help="cut the embedding table among the tensor-parallel ranks",
    )
    group.add_argument(
        "--embedding_sharding_dim",
        type=int,
        default=1,
        choices=(0, 1),
        help="0 cuts the table by vocabulary, 1 by hidden size (default: %(default)s)",
    )


def _add_limit_flags(parser: Parser) -> None:
    limits = BuildLimits()
    group = parser.add_argument_group("limits")
    for name, what in (
        ("max_batch_size", "sequences of one batch"),
        ("max_input_len", "prompt tokens of one request"),
        ("max_output_len", "new tokens of one request"),
        ("max_beam_width", "beams of one request"),
    ):
        group.add_argument(
            f"--{name}",
            type=positive_int,
            default=getattr(limits, name),
            help=f"{what} (default: %(default)s)",
        )
    group.add_argument(
        "--max_num_tokens",
        type=positive_int,
        help="packed tokens of one step; longer prompts are computed in chunks",
    )
    group.add_argument(
        "--paged_kv_cache", action="store_true", help="cache blocks of --tokens_per_block positions"
    )
    group.add_argument(
        "--tokens_per_block",
        type=positive_int,
        default=limits.tokens_per_block,
        help="positions of a cache block, a power of two (default: %(default)s)",
    )
    group.add_argument(
        "--gather_all_token_logits",
        action="store_true",
        help="let run.py return the logits of every prompt token",
    )


def _add_quant_flags(parser: Parser) -> None:
    group = parser.add_argument_group("quantisation")
    group.add_argument("--use_weight_only", action="store_true", help="quantise weights only")
    group.add_argument(
        "--weight_only_precision",
        nargs="?",
        const="int8",
        default="int8",
        choices=("int8", "int4", "int4_awq", "int4_gptq"),
        help="with --use_weight_only (default: %(default)s)",
    )
    group.add_argument("--use_smooth_quant", action="store_true", help="INT8 weights, activations")
    group.add_argument(
        "--per_channel", action="store_true", help="SmoothQuant: weight scale per output channel"
    )
    group.add_argument(
        "--per_token", action="store_true", help="SmoothQuant: activation scale per token"
    )
    group.add_argument(
        "--per_group", action="store_true", help="grouped scales; implied by int4_awq and int4_gptq"
    )
    group.add_argument(
        "--group_size",
        type=positive_int,
        help="inputs of a group (default: the checkpoint's own, or 128)",
    )
    group.add_argument("--enable_fp8", action="store_true", help="FP8 weights and activations")
    group.add_argument(
        "--quantize_lm_head",
        action="store_true",
        help="store the output head too as INT8, one scale per token of the vocabulary, whatever "
        "the mode of the linear layers; every logit changes a little (default: in --dtype)",
    )
    group.add_argument("--int8_kv_cache", action="store_true", help="store the KV cache as INT8")
    group.add_argument("--fp8_kv_cache", action="store_true", help="store the KV cache as FP8")


def _add_shape_flags(parser: Parser) -> None:
    group = parser.add_argument_group(
        "model shape", "for builds without a checkpoint (random weights); defaults are Yi-6B's"
    )
    for name in ("vocab_size", "n_layer", "n_positions", "n_embd", "n_head", "n_kv_head"):
        group.add_argument(f"--{name}", type=positive_int)
    group.add_argument("--inter_size", type=positive_int, help="MLP width")
    group.add_argument(
        "--multiple_of",
        type=positive_int,
        default=256,
        help="the MLP width without --inter_size is rounded up to this (default: %(default)s)",
    )
    group.add_argument(
        "--ffn_dim_multiplier",
        type=positive_float,
        default=1.0,
        help="scales the MLP width without --inter_size (default: %(default)s)",
    )
    group.add_argument("--hidden_act", help="silu")
    group.add_argument("--rms_norm_eps", type=positive_float)
    group.add_argument(
        "--rotary_base", type=positive_float, help="overrides the checkpoint's rope_theta"
    )
    group.add_argument(
        "--rotary_scaling",
        nargs=2,
        metavar=("TYPE", "FACTOR"),
        help="overrides the checkpoint's rope scaling: linear or dynamic, and a factor above 1",
    )


def _add_switches(parser: Parser) -> None:
    group = parser.add_argument_group(
        "TensorRT switches", "recorded in config.json; the torch backend reports those it ignores"
    )
    for name in ("use_gpt_attention_plugin", "use_gemm_plugin", "use_rmsnorm_plugin"):
        group.add_argument(
            f"--{name}", nargs="?", const="float16", default=False, choices=PLUGIN_TYPES
        )
    for name in (
        "enable_context_fmha",
        "enable_context_fmha_fp32_acc",
        "multi_block_mode",
        "remove_input_padding",
        "use_fused_mlp",
        "use_custom_all_reduce",
        "strongly_typed",
        "load_by_shard",
        "disable_weight_only_quant_plugin",
        "visualize",
        "enable_debug_output",
    ):
        group.add_argument(f"--{name}", action="store_true")
    group.add_argument("--gpus_per_node", type=positive_int, default=8)
    group.add_argument("--builder_opt", type=int)
    group.add_argument(
        "--timing_cache",
        metavar="FILE",
        default="model.cache",
        help="the model.cache of another engine directory: kernels measured there are not measured "
        "again on the same GPU",
    )


def _add_later_flags(parser: Parser) -> None:
    group = parser.add_argument_group("not available in this version")
    group.add_argument("--use_inflight_batching", action="store_true")
    group.add_argument("--max_prompt_embedding_table_size", type=int, default=0)
    group.add_argument("--use_lora_plugin", nargs="?", const="float16", default=False)
    group.add_argument("--hf_lora_dir", metavar="DIR")
    for name in ("moe_num_experts", "moe_top_k", "moe_tp_mode", "moe_renorm_mode"):
        group.add_argument(f"--{name}", type=int, default=0)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args: Namespace = parser.parse_args(argv)
    log.setup(args.log_level)
    # A terminated build cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    # Planning imports torch, so --help does without it.
    from utils import build_plan, build_report

    plan = build_plan.plan_build(vars(args), vars(parser.parse_args([])))
    build_report.announce(plan)
    if args.export_checkpoint is not None:
        with log.ProgressBar("writing checkpoint", unit="B") as bar:
            report = build_plan.export_checkpoint(plan, args.export_checkpoint, bar.update_to)
        build_report.print_checkpoint(args.export_checkpoint, report)
        return 0
    with log.ProgressBar("writing engine", unit="B") as bar:
        report = build_plan.get_backend(args.backend).build(plan, bar.update_to)
    build_report.print_report(plan, report)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_main(main))
