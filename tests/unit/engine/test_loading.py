"""Loading in chunks: the same tensors as mapping the file, and the same refusals."""

from __future__ import annotations

import pytest
import torch

from engine import engine_file, loading
from engine.backends import read_record
from engine.engine_file import map_tensors
from engine.errors import EngineError
from tests.cli.build_runner import SMALL_DUMMY, run_here


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A rank file of several chunks, the last of them short."""
    monkeypatch.setattr(engine_file, "CHUNK", 5000)
    monkeypatch.setattr(loading, "CHUNK", 5000)
    flags = (*SMALL_DUMMY, "--output_dir", tmp_path, "--log_level", "error")
    assert run_here(*flags).status == 0
    return tmp_path


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_same_as_the_mapped_file(engine, threads):
    [file] = read_record(engine).files
    assert file.bytes % 5000
    found = loading.load_tensors(engine / file.name, file, torch.device("cpu"), threads)
    mapped = map_tensors(engine / file.name)
    assert found.keys() == mapped.keys()
    assert all(torch.equal(found[name], mapped[name]) for name in mapped)


def test_a_changed_byte_is_refused(engine):
    [file] = read_record(engine).files
    data = bytearray((engine / file.name).read_bytes())
    data[12_000] ^= 1
    (engine / file.name).write_bytes(data)
    with pytest.raises(EngineError, match="does not match the checksum"):
        loading.load_tensors(engine / file.name, file, torch.device("cpu"), 2)
    (engine / file.name).write_bytes(data[:-1])
    with pytest.raises(EngineError, match="is truncated"):
        loading.load_tensors(engine / file.name, file, torch.device("cpu"), 2)
    (engine / file.name).unlink()
    with pytest.raises(EngineError, match="is missing"):
        loading.load_tensors(engine / file.name, file, torch.device("cpu"), 2)
