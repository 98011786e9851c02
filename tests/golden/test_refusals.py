"""What run.py refuses: exit status 2, one sentence on stderr, nothing on stdout, nobody hanging."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import env
from engine.backends import open_engine
from engine.comm import World, open_world
from engine.engine_file import verify_file
from engine.errors import EngineError, RequestError
from engine.models.yi import Yi
from engine.sampling import SamplingParams
from tests.cli.build_runner import SMALL_DUMMY, run_here
from tests.conftest import ROOT
from tests.golden.truth import TINY_YI
from tests.mpi import calling, run_ranks

VOCAB = 61  # that of SMALL_DUMMY, whose limits are 32 and 16 tokens


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[int, Path]:
    """Engines with random weights, by their number of ranks."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp("engine")
        flags = ("--max_beam_width", "2", "--tp_size", str(ranks))
        built = run_here(*SMALL_DUMMY, *flags, "--output_dir", folders[ranks])
        assert built.status == 0, built.stderr
    return folders


@pytest.fixture
def damaged(engines, tmp_path) -> Path:
    """A copy to damage, of the engine for two ranks."""
    return Path(shutil.copytree(engines[2], tmp_path / "damaged"))


def write_prompt(folder: Path, *ids: int) -> Path:
    path = folder / "prompt.csv"
    path.write_text(",".join(map(str, ids)))
    return path


def run_arguments(engine: Path, *flags: str | Path) -> list[str]:
    output = () if "--max_output_len" in flags else ("--max_output_len", "4")
    return ["run.py", "--engine_dir", str(engine), *output, *map(str, flags)]


def only_message(stderr: str) -> str:
    """Our one sentence; what mpirun adds to it is its own."""
    messages = [line for line in stderr.splitlines() if line.startswith("run.py: error: ")]
    assert len(messages) == 1, stderr
    assert "Traceback" not in stderr
    return messages[0]


def refused(engine: Path, *flags: str | Path) -> str:
    """The sentence with which one rank refuses."""
    ended = subprocess.run(
        [sys.executable, *run_arguments(engine, *flags)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("#")]
    assert len(lines) == 1, ended.stderr
    return only_message(ended.stderr)


def refused_by_ranks(ranks: int, engine: Path, *flags: str | Path) -> str:
    ended = run_ranks(ranks, run_arguments(engine, *flags))
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    return only_message(ended.stderr)


# Flags, and what the sentence must say; FILE stands for a prompt of three tokens.
REQUESTS = {
    "output too long": (("FILE", "--max_output_len", "17"), ("--max_output_len 17", "16")),
    "too many beams": (("FILE", "--num_beams", "3"), ("--num_beams 3", "--max_beam_width 2")),
    "end id": (("FILE", "--end_id", "2", str(VOCAB)), ("--end_id", str(VOCAB), "0 to 60")),
    "pad id": (("FILE", "--pad_id", "999"), ("--pad_id", "999", "0 to 60")),
    "bad word": (
        ("FILE", "--tokenizer_dir", str(TINY_YI), "--end_id", "2", "--bad_words", "module"),
        ("--bad_words", "0 to 60", "tokenizer"),
    ),
    "stop word": (
        ("FILE", "--tokenizer_dir", str(TINY_YI), "--end_id", "2", "--stop_words", "module"),
        ("--stop_words", "0 to 60", "tokenizer"),
    ),
    "empty prompt": (
        ("--tokenizer_dir", str(TINY_YI), "--input_text", ""),
        ("--input_text", "prompt 0"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "said"), REQUESTS.values(), ids=REQUESTS)
def test_request(flags, said, engines, tmp_path):
    prompt = ("--input_file", write_prompt(tmp_path, 1, 2, 3))
    expanded = [word for flag in flags for word in (prompt if flag == "FILE" else (flag,))]
    message = refused(engines[1], *expanded)
    assert all(part in message for part in said), message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (range(1, 34), ("33 tokens", "--max_input_len 32")),
        ((1, VOCAB, 2), (str(VOCAB), "0 to 60")),
        ((), ("no prompt",)),
    ],
    ids=["too long", "token outside the vocabulary", "no token"],
)
def test_prompt(ids, said, engines, tmp_path):
    message = refused(engines[1], "--input_file", write_prompt(tmp_path, *ids))
    assert all(part in message for part in said), message


@pytest.mark.slow
@pytest.mark.mpi
def test_request_is_refused_by_all_ranks_once(engines, tmp_path):
    prompt = write_prompt(tmp_path, 1, 2, 3)
    message = refused_by_ranks(2, engines[2], "--input_file", prompt, "--end_id", str(VOCAB))
    assert "--end_id" in message and "0 to 60" in message


def test_every_rank_looks_at_a_request(engines, monkeypatch):
    """Before it computes anything, whether or not it is the rank that decides."""
    session = open_engine(engines[1], World(), device="cpu")
    monkeypatch.setattr(session, "_decides_on", 1)
    monkeypatch.setattr(Yi, "__call__", lambda *_: pytest.fail("computed"))
    with pytest.raises(RequestError, match="--end_id holds token id 61"):
        session.generate([[1, 2]], [SamplingParams(max_new_tokens=2, end_ids=(VOCAB,))])


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("built", "running", "said"),
    [
        (1, 2, ("for 1 rank ", "2 are running", "as: python run.py")),
        (2, 1, ("for 2 ranks ", "1 is running", "mpirun -n 2 python run.py")),
        (2, 3, ("for 2 ranks ", "3 are running", "mpirun -n 2 python run.py")),
    ],
)
def test_wrong_number_of_ranks(built, running, said, engines, tmp_path):
    prompt = ("--input_file", write_prompt(tmp_path, 1))
    if running == 1:
        message = refused(engines[built], *prompt)
    else:
        message = refused_by_ranks(running, engines[built], *prompt)
    assert all(part in message for part in said), message


def rank_file(folder: Path, rank: int) -> Path:
    [path] = folder.glob(f"*_rank{rank}.engine")
    return path


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def age(path: Path) -> None:
    config = json.loads(path.read_text())
    config["engine"]["schema_version"] += 1
    path.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (shorten, "*_rank0.engine", "truncated"),
        (lambda path: flip_byte(path, -5000), "*_rank0.engine", "checksum"),
        (Path.unlink, "*_rank0.engine", "missing"),
        (age, "config.json", "schema version 2"),
        (Path.unlink, "config.json", "no config.json"),
    ],
    ids=["truncated", "flipped", "rank file missing", "another schema", "no config.json"],
)
def test_damaged_engine(damage, name, said, engines, tmp_path):
    engine = Path(shutil.copytree(engines[1], tmp_path / "damaged"))
    [path] = engine.glob(name)
    damage(path)
    message = refused(engine, "--input_file", write_prompt(tmp_path, 1))
    assert str(path if path.exists() else engine) in message
    assert said in message and "build" in message


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_any_flipped_byte_is_found(part, engines, tmp_path):
    engine = Path(shutil.copytree(engines[1], tmp_path / "damaged"))
    path = rank_file(engine, 0)
    session = open_engine(engine, World(), device="cpu")
    verify_file(path, session.info.files[0], 1)
    flip_byte(path, int(part * (path.stat().st_size - 1)))
    with pytest.raises(EngineError, match="checksum"):
        open_engine(engine, World(), device="cpu")


@pytest.mark.slow
@pytest.mark.mpi
def test_one_damaged_rank_ends_the_job(damaged, tmp_path):
    """While the other waits for it."""
    flip_byte(rank_file(damaged, 1), 10_000)
    message = refused_by_ranks(2, damaged, "--input_file", write_prompt(tmp_path, 1))
    assert str(rank_file(damaged, 1)) in message and "checksum" in message


def generate_and_fail(engine_dir: str, way: str) -> None:
    """Rank 1 fails in its third step, while the other waits for its part of a sum."""
    session = open_engine(engine_dir, open_world(), device="cpu")
    compute, steps = session._network, iter(range(3))

    def fail_at_last(*arguments):
        if env.rank() == 1 and next(steps) == 2:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("in the third step")
        return compute(*arguments)

    fail_at_last.device, fail_at_last.dtype = compute.device, compute.dtype
    fail_at_last.kv_scales = compute.kv_scales
    session._network = fail_at_last
    session.generate([[1, 2, 3]], [SamplingParams(max_new_tokens=8, end_ids=())])
    raise AssertionError("it went on")


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(("way", "tracebacks"), [("exception", 1), ("killed", 0)])
def test_rank_that_fails_on_the_way_ends_the_job(way, tracebacks, engines):
    ended = run_ranks(2, calling(generate_and_fail, str(engines[2]), way), timeout=60)
    assert ended.returncode not in (0, 2)
    assert ended.stderr.count("Traceback") == tracebacks, ended.stderr
    assert ended.stderr.count("ArithmeticError: in the third step") == tracebacks
