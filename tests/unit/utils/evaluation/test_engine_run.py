"""How engines are named and started; running them is golden's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.mapping import Mapping
from engine.quant import Algorithm, KVStorage, QuantConfig
from tests.unit.utils.evaluation.test_prepare import RECORD
from utils.evaluation import engine_run
from utils.evaluation.compare import short_names
from utils.evaluation.engine_run import describe_mode, parting_context
from utils.evaluation.task import Case, Divergence, Rules, Task
from utils.generation import Decoding


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (("/a/b/c",), ["c"]),
        (("/e/int8/1-gpu", "/e/int4/1-gpu"), ["int8/1-gpu", "int4/1-gpu"]),
        (("/e/int8/1-gpu", "/e/int4/1-gpu", "/e/tp2"), ["int8/1-gpu", "int4/1-gpu", "e/tp2"]),
        (("/a/x/y", "/b/x/y"), ["a/x/y", "b/x/y"]),
        ((), []),
    ],
)
def test_names_are_the_shortest_that_differ(folders, names):
    assert short_names(folders) == names


@pytest.mark.parametrize(
    ("quant", "mode"),
    [
        (QuantConfig(), "float32"),
        (QuantConfig(Algorithm.W8A16), "float32, w8a16"),
        (QuantConfig(kv=KVStorage.INT8), "float32, int8 KV cache"),
        (
            QuantConfig(Algorithm.W4A16_AWQ, group_size=128, kv=KVStorage.FP8),
            "float32, w4a16_awq g128, fp8 KV cache",
        ),
    ],
)
def test_modes_name_what_is_special(quant, mode):
    record = replace(RECORD, quant=quant)
    assert describe_mode(record) == mode
    ranks = replace(record, mapping=Mapping(world=4, tp=2, pp=2))
    assert describe_mode(ranks) == f"{mode}, tp 2, pp 2"


def test_context_is_prompt_and_shared_tokens():
    task = Task((Case("0", (1, 2)), Case("1", (3,))), Rules(Decoding(), 4, (2,), 0), 1)
    assert parting_context(task, [(8, 9), (5, 6, 7)], Divergence(1, 2)) == (3, 5, 6)


def test_ranks_start_under_mpirun(tmp_path, monkeypatch):
    assert engine_run._launcher(1) == []
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(engine_run.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match="^an engine of 4 ranks needs mpirun, which is not there; i"
    ):
        engine_run._launcher(4)
    (tmp_path / "mpirun").touch()
    assert engine_run._launcher(4)[:3] == [str(tmp_path / "mpirun"), "-n", "4"]
    assert Path(engine_run.ROOT / "summarize.py").is_file()
