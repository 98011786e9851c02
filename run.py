#!/usr/bin/env python3
"""Generate text with an engine that build.py made: python run.py, or mpirun -n WORLD python run.py.

Prompts are --input_text, --input_file, typed lines at a terminal, or else a default sentence.
Decoding is greedy unless flags say otherwise, in a chat, too.
"""

from __future__ import annotations

import sys

from utils import log
from utils.cli import Parser, add_gpu_flags, positive_int, run_main
from utils.generation import add_decoding_flags, add_end_ids
from utils.output import allow_any_text
from utils.run_plan import plan_run


def make_parser() -> Parser:
    parser = Parser(prog="run.py", description=__doc__)
    _add_engine_flags(parser)
    _add_prompt_flags(parser)
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--max_output_len", type=positive_int, required=True, help="new tokens of a prompt"
    )
    add_decoding_flags(decoding)
    _add_output_flags(parser)
    _add_other_flags(parser)
    return parser


def _add_engine_flags(parser: Parser) -> None:
    group = parser.add_argument_group("engine and tokenizer")
    group.add_argument(
        "--engine_dir",
        metavar="DIR",
        default="engine_outputs",
        help="what build.py wrote (default: %(default)s)",
    )
    group.add_argument(
        "--tokenizer_dir",
        metavar="DIR",
        help="the checkpoint, as a folder or a hub id such as 01-ai/Yi-6B (default: the tokenizer "
        "in the engine directory)",
    )
    group.add_argument(
        "--vocab_file", metavar="FILE", help="sentencepiece model to use as the tokenizer"
    )
    group.add_argument(
        "--tokenizer_type",
        metavar="NAME",
        help="model type whose tokenizer class reads a folder without tokenizer.model or .json; "
        "no effect on the others, whose files say everything",
    )
    group.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the checkpoint's own tokenizer code if it has no tokenizer.model or .json",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if any"
    )
    group.add_argument(
        "--max_attention_window_size",
        "--max_kv_cache_len",
        type=positive_int,
        metavar="TOKENS",
        help="attend to this many last tokens only (default: all)",
    )
    add_gpu_flags(group)
    group.add_argument(
        "--log_level",
        default="warning",
        help="error, warning, info, verbose or debug (default: %(default)s)",
    )


def _add_prompt_flags(parser: Parser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--input_text", nargs="+", metavar="TEXT", help="prompts")
    group.add_argument(
        "--input_file",
        "--input_tokens",
        metavar="FILE",
        help="prompts: .txt (one a line), .csv (token ids of one a line) or .npy (token ids, a row "
        "each, padding cut off)",
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts; so it does at a terminal if it is given none",
    )
    group.add_argument(
        "--chat", action="store_true", help="texts are a user's messages, in the chat template"
    )
    group.add_argument("--system_prompt", metavar="TEXT", help="what a chat begins with")
    group.add_argument(
        "--max_input_length",
        "--input_tokens_limit",
        type=positive_int,
        metavar="TOKENS",
        help="keep a prompt's last tokens only (default: a prompt too long is refused)",
    )
    group.add_argument(
        "--no_add_special_tokens",
        action="store_true",
        help="no bos or eos around prompts, even if the tokenizer has them",
    )


def _add_output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--streaming", action="store_true", help="print outputs as they grow")
    group.add_argument(
        "--streaming_interval",
        type=positive_int,
        default=5,
        metavar="TOKENS",
        help="tokens between two prints (default: %(default)s)",
    )
    group.add_argument(
        "--run_profiling",
        action="store_true",
        help="run twice and print the second run's latency, tokens/s and time to first token",
    )
    for flag, what in (
        ("output_csv", "ids of prompt and output, a row per beam, filled up with the end id"),
        ("output_npy", "the same as int32 [prompts x beams, tokens]"),
    ):
        group.add_argument(f"--{flag}", metavar="FILE", help=f"{what}; replaces the printed text")
    for flag, what in (
        (
            "output_logits_npy",
            "NAME_context.npy and NAME_generation.npy: logits; the engine must have been built "
            "with --gather_all_token_logits",
        ),
        ("output_log_probs_npy", "log probability of every new token [prompts, 1, tokens]"),
        ("output_cum_log_probs_npy", "log probability of every output [prompts, beams]"),
    ):
        group.add_argument(f"--{flag}", metavar="FILE", help=what)


def _add_other_flags(parser: Parser) -> None:
    group = parser.add_argument_group("not available in this version")
    group.add_argument("--lora_dir", nargs="+", metavar="DIR")
    group.add_argument("--lora_task_uids", nargs="+", metavar="UID")
    group.add_argument("--lora_ckpt_source", choices=("hf", "nemo"))
    group.add_argument("--prompt_table_path", "--prompt_table", metavar="FILE")
    group.add_argument("--prompt_tasks", "--tasks", metavar="TASKS")
    group.add_argument("--num_prepend_vtokens", nargs="+", type=int, metavar="TOKENS")
    group = parser.add_argument_group("accepted, without meaning here")
    group.add_argument("--use_py_session", action="store_true")
    group.add_argument("--debug_mode", action="store_true")
    group.add_argument("--no_prompt_template", action="store_true")


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    log.setup(args.log_level)
    allow_any_text()
    plan = plan_run(vars(args))
    # These import torch, which --help and mistaken flags do without.
    from engine.backends import open_engine
    from engine.comm import open_world
    from utils import interactive, request, run_batch

    world = open_world()
    if world.rank == 0:
        for remark in plan.remarks:
            log.warning(remark)
    tokenizer, wanted = request.prepare_request(plan, world)
    params = request.make_params(plan, wanted)
    session = open_engine(
        plan.engine_dir,
        world,
        device=plan.device,
        max_attention_window=plan.max_attention_window,
        tuning=plan.tuning,
        may_share_gpu=plan.may_share_gpu,
    )
    for note in session.info.notes:
        log.warn_loudly(note)
    if plan.end_ids is None:
        params = add_end_ids(params, session.info.generation)
    if wanted.is_typed:
        interactive.run_interactive(session, world, plan, params[0], tokenizer)
    else:
        run_batch.run_batch(session, world, plan, wanted, params, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
