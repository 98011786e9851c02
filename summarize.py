#!/usr/bin/env python3
"""Say whether an engine is as good as its checkpoint: ROUGE, perplexity, agreement and speed of
one or several engines and of transformers, on the same token ids.

python summarize.py, or mpirun -n WORLD python summarize.py for an engine of several ranks. Several
engines are each started as a job of their own, with mpirun where they need it.
"""

from __future__ import annotations

import sys

from utils import log
from utils.cli import Parser, add_gpu_flags, non_negative_float, positive_int, run_main
from utils.evaluation.plan import DATA_TYPES, TASKS, plan_evaluation
from utils.generation import add_decoding_flags
from utils.output import allow_any_text

# The status of a check that failed, which is no mistake of the command line.
CHECK_FAILED = 1


def make_parser() -> Parser:
    parser = Parser(prog="summarize.py", description=__doc__)
    _add_side_flags(parser)
    _add_data_flags(parser)
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--output_len",
        type=positive_int,
        default=100,
        metavar="TOKENS",
        help="new tokens of an article (default: %(default)s)",
    )
    add_decoding_flags(decoding)
    _add_report_flags(parser)
    return parser


def _add_side_flags(parser: Parser) -> None:
    group = parser.add_argument_group("what to test")
    group.add_argument(
        "--test_trt_llm", "--test_engine", action="store_true", help="test the engines"
    )
    group.add_argument("--test_hf", action="store_true", help="test the checkpoint in transformers")
    group.add_argument(
        "--engine_dir",
        nargs="+",
        metavar="DIR",
        default=["engine_outputs"],
        help="what build.py wrote, one or several (default: engine_outputs)",
    )
    group.add_argument(
        "--hf_model_location",
        "--hf_model_dir",
        "--model_dir",
        metavar="DIR",
        help="the checkpoint, as a folder or a hub id such as 01-ai/Yi-6B",
    )
    group.add_argument(
        "--data_type",
        choices=tuple(DATA_TYPES),
        default="fp16",
        help="of transformers; an engine has the type it was built with (default: %(default)s)",
    )
    group.add_argument(
        "--hf_device_map_auto",
        action="store_true",
        help="spread the checkpoint over all GPUs (needs the package accelerate)",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any"
    )
    group.add_argument(
        "--max_attention_window_size",
        "--max_kv_cache_len",
        "--max_kv_cache_length",
        type=positive_int,
        metavar="TOKENS",
        help="the engine attends to this many last tokens only (default: all)",
    )
    add_gpu_flags(group)
    group.add_argument(
        "--tokenizer_dir", metavar="DIR", help="default: the checkpoint's, else the engine's"
    )
    group.add_argument(
        "--vocab_file", metavar="FILE", help="sentencepiece model to use as the tokenizer"
    )
    group.add_argument(
        "--tokenizer_type", metavar="NAME", help="see run.py; no effect on most folders"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run the checkpoint's own code if it has"
    )


def _add_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("task and data")
    group.add_argument(
        "--eval_task",
        choices=TASKS,
        default="summarize",
        help="summarize: ROUGE against the highlights; generate: continue the articles, agreement "
        "only; ppl: perplexity only (default: %(default)s)",
    )
    group.add_argument(
        "--eval_ppl", action="store_true", help="measure perplexity, too; any engine can"
    )
    group.add_argument(
        "--ppl_file", metavar="FILE", help="text for perplexity (default: the articles)"
    )
    group.add_argument(
        "--dataset_path",
        metavar="PATH",
        help="articles and highlights: a folder or a .parquet, .json or .jsonl file (default: the "
        "test split of CNN/DailyMail 3.0.0, from the cache or the hub)",
    )
    group.add_argument("--batch_size", type=positive_int, default=1, help="default: %(default)s")
    group.add_argument(
        "--max_ite", type=positive_int, default=20, help="batches (default: %(default)s)"
    )
    group.add_argument(
        "--max_input_length",
        type=positive_int,
        default=923,
        metavar="TOKENS",
        help="keep a prompt's last tokens only (default: %(default)s)",
    )
    group.add_argument(
        "--no_add_special_tokens",
        action="store_true",
        help="no bos or eos around prompts, even if the tokenizer has them",
    )


def _add_report_flags(parser: Parser) -> None:
    group = parser.add_argument_group("checks and report")
    group.add_argument(
        "--check_accuracy",
        action="store_true",
        help="exit with status 1 if an engine's ROUGE-1 is below the threshold",
    )
    group.add_argument(
        "--tensorrt_llm_rouge1_threshold",
        type=float,
        default=15.0,
        metavar="POINTS",
        help="default: %(default)s",
    )
    group.add_argument(
        "--check_parity",
        type=non_negative_float,
        metavar="DELTA",
        help="exit with status 1 if an engine and transformers differ by more than DELTA points in "
        "a ROUGE score, or more than DELTA per cent in perplexity",
    )
    group.add_argument(
        "--output_dir",
        metavar="DIR",
        help="write report.json, report.md, the answers of each side (.jsonl) and for several "
        "engines a bar chart",
    )
    group.add_argument(
        "--log_level",
        default="info",
        help="error, warning, info, verbose or debug (default: %(default)s)",
    )
    group = parser.add_argument_group("accepted, without meaning here")
    group.add_argument("--use_py_session", action="store_true")
    group.add_argument("--debug_mode", action="store_true")


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.setup(args.log_level)
    allow_any_text()
    plan = plan_evaluation(vars(args))
    # These import torch, which --help and mistaken flags do without.
    from engine.comm import open_world
    from utils.evaluation.checks import find_failures
    from utils.evaluation.compare import Comparison
    from utils.evaluation.report import Report

    world = open_world()
    comparison = Comparison(plan, world, args.log_level)
    if world.rank == 0:
        for remark in (*plan.remarks, *comparison.prepared.notes):
            log.warning(remark)
    outcomes = comparison.run()
    failures: list[str] = []
    if world.rank == 0:
        failures = find_failures(plan.checks, outcomes)
        report = Report(plan, comparison.prepared, outcomes, tuple(failures))
        print(report.to_markdown())
        if plan.output_dir is not None:
            report.write(plan.output_dir)
        for failure in failures:
            print(f"summarize.py: {failure}", file=sys.stderr)
    return CHECK_FAILED if world.bcast(failures) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
