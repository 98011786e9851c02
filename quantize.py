#!/usr/bin/env python3
"""Quantise a checkpoint: what build.py cannot compute without looking at texts.

fp8 writes scaling factors (.npz), int4_awq and int4_gptq weights (.pt, .safetensors); int8_sq,
int8_wo and int4_wo write a checkpoint directory, the last two without any calibration. All but
int4_gptq run NVIDIA ModelOpt and hold the whole model in memory, 2 bytes a weight in bfloat16 and
up to 50 % more while a directory is written (Yi-6B: 13 to 18 GB); int4_gptq holds one layer.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from engine import env
from engine.errors import UserError
from utils import log
from utils.cli import Parser, non_negative_int, positive_int, run_main

QFORMATS = ("fp8", "int4_awq", "int8_sq", "int8_wo", "int4_wo", "int4_gptq")


def make_parser() -> Parser:
    parser = Parser(prog="quantize.py", description=__doc__)
    parser.add_argument(
        "--model_dir",
        metavar="DIR",
        required=True,
        help="full-precision checkpoint: a folder or a hub id such as 01-ai/Yi-6B",
    )
    parser.add_argument(
        "--qformat", choices=QFORMATS, default="fp8", help="what to make (default: %(default)s)"
    )
    parser.add_argument(
        "--export_path",
        "--output_dir",
        metavar="PATH",
        default="exported_model",
        help="file or directory to write (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="type to compute in; on a CPU, float16 is computed in bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--group_size",
        "--awq_block_size",
        type=positive_int,
        metavar="INPUTS",
        help="inputs that share a scale in int4 formats: 128, 64 or 32 (default: 128)",
    )
    parser.add_argument(
        "--quantize_lm_head",
        action="store_true",
        help="refused: the head stays as it is here and is quantised by build.py's flag of this "
        "name",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any"
    )
    parser.add_argument(
        "--log_level", default="info", help="error, warning, info, verbose or debug"
    )
    _add_calibration_flags(parser)
    return parser


def _add_calibration_flags(parser: Parser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_dataset",
        metavar="PATH",
        help="texts: a .txt, .jsonl, .json or .parquet file, or a folder of a data set (default: "
        "CNN/DailyMail from the Hugging Face hub or its cache)",
    )
    group.add_argument(
        "--calib_size",
        type=positive_int,
        metavar="TEXTS",
        help="default: 512, for int4_gptq 128, for int4_awq 32",
    )
    group.add_argument(
        "--calib_max_length",
        "--calib_max_seq_length",
        type=positive_int,
        default=512,
        metavar="TOKENS",
        help="taken of each text (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=1,
        help="texts at once, of those that have one length (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=non_negative_int,
        help="take a random part of long texts, drawn with this (default: their beginning)",
    )
    group.add_argument(
        "--cache_dir", metavar="DIR", help="where the hub's data set is kept (default: its own)"
    )


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.setup(args.log_level)
    if env.under_mpi():
        raise UserError("quantize.py is one process; run it without mpirun")
    # A terminated run removes its drafts as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    # These import torch, which --help does without.
    from utils.quantisation.plan import plan_quantise
    from utils.quantisation.produce import build_command, produce

    plan = plan_quantise(vars(args))
    for note in plan.notes:
        log.warning(note)
    produce(plan)
    print(f"{plan.qformat} written to {plan.output}; build an engine with it:")
    print(build_command(plan))
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_main(main))
