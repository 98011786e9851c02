#!/usr/bin/env python3
"""Calibrate a checkpoint for SmoothQuant or an INT8 KV cache, for build.py --ft_model_dir.

Writes OUT_DIR/N-gpu, N being the tensor parallelism; engines of any --tp_size are built from it.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentTypeError
from types import FrameType

from utils import log
from utils.cli import Parser, positive_int, run_main


def make_parser() -> Parser:
    parser = Parser(prog="hf_yi_convert.py", description=__doc__)
    _add_files(parser)
    _add_modes(parser)
    _add_calibration(parser)
    return parser


def _add_files(parser: Parser) -> None:
    group = parser.add_argument_group("source and destination")
    group.add_argument(
        "--in-file",
        "-i",
        metavar="DIR",
        required=True,
        help="checkpoint: a Hugging Face folder or hub id such as 01-ai/Yi-6B, or a folder in "
        "Meta's format",
    )
    group.add_argument(
        "--out-dir", "-o", metavar="DIR", required=True, help="the folder N-gpu is made in it"
    )
    group.add_argument(
        "--tensor-parallelism",
        "-tp",
        metavar="N",
        type=positive_int,
        default=1,
        help="files that each weight is cut into (default: %(default)s)",
    )
    group.add_argument(
        "--storage-type",
        "-t",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="type of the full-precision weights (default: %(default)s)",
    )
    group.add_argument(
        "--processes",
        "-p",
        metavar="N",
        type=positive_int,
        default=4,
        help="threads that quantise and write a layer's files (default: %(default)s)",
    )
    group.add_argument("--log_level", default="info", help="error, warning, info, verbose or debug")


def _add_modes(parser: Parser) -> None:
    group = parser.add_argument_group("what to make (one at least)")
    group.add_argument(
        "--calibrate-kv-cache",
        "-kv",
        action="store_true",
        help="scales of an INT8 KV cache for keys and values of every head; --smoothquant makes "
        "them, too",
    )
    group.add_argument(
        "--smoothquant",
        "-sq",
        metavar="ALPHA",
        type=_alpha,
        help="smoothed INT8 weights and scales of the activations; ALPHA from 0 to 1 moves the "
        "difficulty from the weights to the activations or back, 0.5 to 0.8 is usual",
    )


def _add_calibration(parser: Parser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib_dataset",
        metavar="PATH",
        help="texts: .txt, .json, .jsonl or .parquet, or a folder of these (default: the articles "
        "of CNN/DailyMail's training split)",
    )
    group.add_argument(
        "--calib_size",
        metavar="N",
        type=positive_int,
        default=512,
        help="texts to use (default: %(default)s)",
    )
    group.add_argument(
        "--calib_max_length",
        metavar="TOKENS",
        type=positive_int,
        default=512,
        help="first tokens of a text to use (default: %(default)s)",
    )
    group.add_argument("--dataset-cache-dir", metavar="DIR", help="cache of the default data set")
    group.add_argument(
        "--load-model-on-cpu", action="store_true", help="calibrate on the CPU even with a GPU"
    )
    group.add_argument(
        "--convert-model-on-cpu",
        action="store_true",
        help="accepted and without effect: weights are always converted on the CPU",
    )


def _alpha(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"'{text}' is not a number from 0 to 1, for example 0.5")
    return value


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.setup(args.log_level)
    # A terminated conversion cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    # Converting imports torch, so --help does without it.
    from utils.convert import convert

    target = convert(vars(args))
    print(f"wrote {target}; build an engine from it with build.py --ft_model_dir {target}")
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_main(main))
