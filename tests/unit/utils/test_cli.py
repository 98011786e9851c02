"""The parser's answers, and how scripts end: alone, and as ranks of a job."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from engine import env
from engine.comm import open_world
from engine.errors import EngineError, UserError
from tests.mpi import ROOT, calling, run_ranks
from utils import cli
from utils.cli import Parser, run_main

SENTENCE = "--engine_dir x is empty; build it first"
RANKS_THAT_FAIL = {"one": (1,), "all": (0, 1, 2, 3)}


def make_parser() -> Parser:
    parser = Parser(prog="build.py")
    parser.add_argument("--max_batch_size", type=cli.positive_int, default=8)
    parser.add_argument("--out-dir", "-o")
    parser.add_argument("--input_text", nargs="+")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"))
    parser.add_argument_group("more").add_argument(
        "--remove_input_padding", action=argparse.BooleanOptionalAction
    )
    return parser


@pytest.mark.parametrize(
    ("given", "flag", "value"),
    [
        (["--max_batch_size", "4"], "max_batch_size", 4),
        (["--max-batch-size", "4"], "max_batch_size", 4),
        (["--max-batch-size=4"], "max_batch_size", 4),
        (["--out-dir", "a_b"], "out_dir", "a_b"),
        (["--out_dir=a-b"], "out_dir", "a-b"),
        (["-o", "c"], "out_dir", "c"),
        (["--remove-input-padding"], "remove_input_padding", True),
        (["--no-remove-input-padding"], "remove_input_padding", False),
        (["--no_remove_input_padding"], "remove_input_padding", False),
        (["--input_text", "max-batch-size", "-- and on"], "input_text", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_in_both_spellings(given: list[str], flag: str, value: Any) -> None:
    expected = given[1:] if value is None else value
    assert getattr(make_parser().parse_args(given), flag) == expected


def test_what_follows_two_dashes_is_left_alone() -> None:
    parser = make_parser()
    parser.add_argument("files", nargs="*")
    assert parser.parse_args(["--", "--max-batch-size"]).files == ["--max-batch-size"]


def test_help_lists_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        make_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "--max_batch_size" in text
    assert "--max-batch-size" not in text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--max_bach_size", "4"], "unknown flag --max_bach_size; did you mean --max_batch_size?"),
        (["--max-bach-size=4"], "unknown flag --max-bach-size; did you mean --max_batch_size?"),
        (["--outdir", "x"], "unknown flag --outdir; did you mean --out-dir?"),
        (["--max_batch", "4"], "unknown flag --max_batch; did you mean --max_batch_size?"),
        (["--zzz"], "unknown flag --zzz; see 'build.py --help' for those there are"),
        (["--max_batch_size", "0"], "--max_batch_size: '0' is not a whole number of at least 1"),
        (["--max_batch_size"], "--max_batch_size: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes_get_a_sentence(given: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        make_parser().parse_args(given)
    assert str(error.value) == sentence


def test_unknown_choice_names_the_choices() -> None:
    with pytest.raises(UserError, match="--dtype: .*'int3'.*float16.*bfloat16"):
        make_parser().parse_args(["--dtype", "int3"])


def test_a_misspelt_required_flag_is_named_as_misspelt() -> None:
    parser = Parser()
    parser.add_argument("--model_dir", required=True)
    with pytest.raises(UserError, match="unknown flag --modle_dir; did you mean --model_dir?"):
        parser.parse_args(["--modle_dir", "x"])
    with pytest.raises(UserError, match="required: --model_dir"):
        parser.parse_args([])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.positive_int, {"1": 1, "64": 64}, ["0", "-1", "1.5", "many", ""]),
        (cli.non_negative_int, {"0": 0, "7": 7}, ["-1", "0.5", "x"]),
        (cli.positive_float, {"0.5": 0.5, "1e-3": 0.001}, ["0", "-1", "nan", "inf", "x"]),
        (cli.non_negative_float, {"0": 0.0, "2": 2.0}, ["-0.1", "nan", "inf", "x"]),
    ],
)
def test_argument_types(
    kind: Callable[[str], float], good: dict[str, float], bad: list[str]
) -> None:
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a"):
            kind(text)


def raising(error: BaseException) -> Callable[[Any], int]:
    def main(argv: list[str] | None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "printed"),
    [
        (lambda argv: 0, 0, ""),
        (lambda argv: None, 0, ""),
        (lambda argv: 3, 3, ""),
        (raising(UserError(SENTENCE)), 2, f"build.py: error: {SENTENCE}\n"),
        (raising(EngineError("two\nlines")), 2, "build.py: error: two lines\n"),
        (raising(KeyboardInterrupt()), 130, "build.py: interrupted\n"),
        (raising(SystemExit(5)), 5, ""),
        (raising(SystemExit()), 0, ""),
        (raising(SystemExit("said why")), 1, "said why\n"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Any], int],
    status: int,
    printed: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["some/where/build.py"])
    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert (exit_.value.code, capsys.readouterr().err) == (status, printed)


def test_programmers_mistakes_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(raising(ValueError("a bug")))
    printed = capsys.readouterr().err
    assert exit_.value.code == 1
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith("ValueError: a bug\n")


def run_python(*argv: str) -> subprocess.Popen[bytes]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI"))}
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def print_much() -> None:
    for _ in range(200_000):
        print("a line that nobody reads")


def test_a_closed_pipe_is_no_news() -> None:
    process = run_python(*calling(print_much))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_scripts_start_without_torch() -> None:
    code = "import sys, utils.cli, utils.log; sys.exit('torch' in sys.modules)"
    process = run_python("-c", code)
    process.communicate()
    assert process.returncode == 0


def fail(how: str, failing: tuple[int, ...]) -> int:
    """End the ranks in `failing` in one way; the others wait for them."""
    world = open_world()
    if world.rank in failing:
        if how == "exit":
            sys.exit(3)
        if how == "return":
            return 4
        raise {"mistake": UserError(SENTENCE), "bug": ValueError("a bug")}[how]
    world.barrier()
    return 0


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("how", "failing", "status", "line"),
    [
        ("mistake", "one", 2, f"-c: error: {SENTENCE}"),
        ("bug", "one", 1, "ValueError: a bug"),
        ("exit", "one", 3, "-c: rank 1 ended with status 3"),
        ("mistake", "all", 2, f"-c: error: {SENTENCE}"),
        ("bug", "all", 1, "ValueError: a bug"),
        ("return", "all", 4, "-c: rank 0 ended with status 4"),
    ],
)
def test_a_failing_rank_ends_the_job_with_one_message(
    how: str, failing: str, status: int, line: str
) -> None:
    argv = calling(fail, how, RANKS_THAT_FAIL[failing])
    done = run_ranks(4 if failing == "all" else 2, argv, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines().count(line) == 1, done.stderr
    assert done.stderr.count("Traceback") == (how == "bug"), done.stderr
    assert done.stderr.count("-c: ") == (how != "bug"), done.stderr


def parse_and_meet(argv: list[str]) -> None:
    make_parser().parse_args(argv)
    open_world().barrier()
    print("met", env.rank())


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("flags", "status", "out", "err"),
    [
        (["--help"], 0, "usage: build.py", ""),
        (["--max_bach_size"], 2, "", "-c: error: unknown flag --max_bach_size; did you mean"),
    ],
    ids=["help", "mistake"],
)
def test_ranks_that_read_the_same_flags(flags: list[str], status: int, out: str, err: str) -> None:
    done = run_ranks(3, calling(parse_and_meet, flags), timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout.count(out or "usage") == bool(out)
    assert done.stderr.count(err or "error") == bool(err)


@pytest.mark.mpi
def test_ranks_that_succeed_end_with_status_0() -> None:
    done = run_ranks(2, calling(parse_and_meet, []), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["met 0", "met 1"]
