"""What every script does with its command line, and how it ends.

Imports neither torch nor mpi4py, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine import env
from engine.comm import World, open_world
from engine.errors import UserError

MISTAKE, INTERRUPTED, BROKEN_PIPE, CRASH = 2, 130, 141, 1

# Ranks usually fail alike. Each waits this long per rank before it speaks and ends the job, so
# that the lowest one is heard and the others are gone before their turn.
SECONDS_PER_RANK = 0.5
LONGEST_WAIT = 6.0
# What MPI prints of its own when it ends a job overtakes what was written just before.
SECONDS_TO_BE_HEARD = 0.1


class _End(NamedTuple):
    status: int
    text: str = ""


def run_main(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """Run a script's `main` and exit with the status it returns.

    A UserError becomes one line on stderr and status 2, Ctrl-C status 130, any other exception
    a traceback and status 1. Under mpirun a rank that fails ends the whole job; ranks that
    fail alike speak once, and interrupted ones not at all, since mpirun does.
    """
    world: World | None = None
    try:
        # MPI starts on all ranks before anything can fail on some of them.
        world = open_world()
        end = _End(_as_status(main(None)))
        sys.stdout.flush()
    except UserError as error:
        end = _End(MISTAKE, f"{_script()}: error: {' '.join(str(error).splitlines())}")
    except KeyboardInterrupt:
        end = _End(INTERRUPTED, f"{_script()}: interrupted")
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end = _End(BROKEN_PIPE)
    except SystemExit as exit_:
        end = _as_end(exit_.code)
    except Exception:
        end = _End(CRASH, traceback.format_exc().rstrip())
    if end.status and env.under_mpi():
        _end_job(world, end)
    if end.text:
        print(end.text, file=sys.stderr)
    sys.exit(end.status)


def _end_job(world: World | None, end: _End) -> None:
    """Say why and take the other ranks down; returns only if MPI could not start."""
    # Another rank that gets here first has this one terminated, which needs no words.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(min(env.rank() * SECONDS_PER_RANK, LONGEST_WAIT))
    if world is None:
        return
    if end.status != INTERRUPTED:
        text = end.text or f"{_script()}: rank {world.rank} ended with status {end.status}"
        print(text, file=sys.stderr, flush=True)
        time.sleep(SECONDS_TO_BE_HEARD)
    world.abort(end.status)


def _as_status(returned: int | None) -> int:
    return returned or 0


def _as_end(code: Any) -> _End:
    """What sys.exit(code) means."""
    if code is None or isinstance(code, int):
        return _End(_as_status(code))
    return _End(CRASH, str(code))


def _script() -> str:
    return Path(sys.argv[0]).name


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing its usage.

    Every long flag is understood with hyphens and with underscores; flags are not abbreviated,
    and an unknown one is answered with the likeliest that exists. Under mpirun only rank 0
    prints --help. It has no sub-commands.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        # Before anything else: a misspelt flag that is required would be reported as missing.
        self._refuse_unknown(given)
        return super().parse_args(given, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._respell(given), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def print_help(self, file: Any = None) -> None:
        if env.rank() == 0:
            super().print_help(file)

    def _long_flags(self) -> dict[str, str]:
        """Spelling with underscores → the flag as it was declared."""
        return {_fold(flag): flag for flag in self._option_string_actions if flag.startswith("--")}

    def _respell(self, given: Sequence[str]) -> list[str]:
        """Long flags as they were declared; what follows '--' is no flag."""
        flags, stop = self._long_flags(), _end_of_flags(given)
        respelt = []
        for word in given[:stop]:
            name, equals, value = word.partition("=")
            is_flag = word.startswith("--")
            respelt.append(flags.get(_fold(name), name) + equals + value if is_flag else word)
        return [*respelt, *given[stop:]]

    def _refuse_unknown(self, given: Sequence[str]) -> None:
        flags = self._long_flags()
        for word in given[: _end_of_flags(given)]:
            name = word.partition("=")[0]
            # Text with a space is a value that begins with dashes.
            if not name.startswith("--") or " " in name or _fold(name) in flags:
                continue
            close = difflib.get_close_matches(_fold(name), flags, n=1)
            remedy = (
                f"did you mean {flags[close[0]]}?"
                if close
                else f"see '{self.prog} --help' for those there are"
            )
            self.error(f"unknown flag {name}; {remedy}")


def _fold(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_")


def _end_of_flags(given: Sequence[str]) -> int:
    return given.index("--") if "--" in given else len(given)


def add_gpu_flags(group: argparse._ActionsContainer) -> None:
    """Those of every script that runs an engine."""
    group.add_argument(
        "--no_tuning",
        action="store_true",
        help="choose kernels by rule on a GPU that the engine's model.cache does not know, instead "
        "of measuring them once, which takes up to 40 seconds",
    )
    group.add_argument(
        "--oversubscribe_gpu",
        action="store_true",
        help="let several ranks share a GPU, which is slow, to try an engine for more GPUs than "
        "there are",
    )


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _parse(text, int, "a whole number of at least 1", lambda value: value >= 1)


def non_negative_int(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _parse(text, int, "a whole number of at least 0", lambda value: value >= 0)


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    return _parse(text, float, "a number above 0", lambda value: 0 < value < math.inf)


def non_negative_float(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    return _parse(text, float, "a number of at least 0", lambda value: 0 <= value < math.inf)


def _parse(text: str, kind: Callable[[str], Any], rule: str, is_valid: Callable[..., bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not {rule}")
    return value
