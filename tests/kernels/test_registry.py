from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from engine.errors import UserError
from engine.kernels import api, cpu, reference, registry
from engine.kernels.registry import Implementation

OPS = [
    name
    for name, member in vars(api).items()
    if inspect.isfunction(member) and member.__module__ == api.__name__
]
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if Triton were installed and there were one kernel file."""
    for name in ("rms_norm.py", "_tiles.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(registry, "TRITON_FOLDER", tmp_path)
    monkeypatch.setattr(registry, "find_spec", lambda name: object())
    monkeypatch.setattr(registry, "_table", registry._table.__wrapped__)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "_table", registry._table.__wrapped__)


def give_capability(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_a_reference_with_its_parameters(op: str) -> None:
    loaded = {i.name: i.load() for i in registry.implementations(op)}
    assert "reference" in loaded
    names = list(inspect.signature(getattr(api, op)).parameters)
    for function in loaded.values():
        assert list(inspect.signature(function).parameters) == names


def test_no_implementation_lacks_an_operation() -> None:
    assert {op for family in registry.FAMILIES for op in family.ops} == set(OPS)


def test_the_cpu_gets_its_own_implementation_first() -> None:
    assert registry.select("linear", CPU) is cpu.linear
    assert registry.select("silu_mul", CPU) is reference.silu_mul


def test_a_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.select("linear", CPU)
    monkeypatch.setattr(registry, "_choose", None)
    assert registry.select("linear", CPU) is cpu.linear


@pytest.mark.usefixtures("without_triton")
def test_a_foreign_device_is_refused_with_the_candidates() -> None:
    with pytest.raises(UserError) as error:
        registry.select("linear", torch.device("meta"))
    assert str(error.value) == (
        "device meta has no implementation of linear; run on one of these: cpu (cpu); "
        "reference (cpu, cuda)"
    )


def test_an_unknown_operation_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="'liner'"):
        registry.select("liner", CPU)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    "capability, name", [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")]
)
def test_a_triton_file_is_found_and_needs_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    give_capability(monkeypatch, *capability)
    chosen = registry._choose("rms_norm", CUDA)
    assert chosen.name == name
    assert (
        chosen.target
        == {
            "triton": "engine.kernels.triton.rms_norm:rms_norm",
            "reference": "engine.kernels.reference:rms_norm",
        }[name]
    )
    assert registry._choose("rms_norm", CPU).name == "cpu"


@pytest.mark.usefixtures("with_triton")
def test_helpers_beside_triton_kernels_are_no_operations() -> None:
    with pytest.raises(AssertionError):
        registry._candidates("_tiles")


@pytest.mark.usefixtures("with_triton")
def test_implementations_leave_out_absent_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "present_devices", lambda: ("cpu",))
    found = [str(i) for i in registry.implementations("rms_norm")]
    assert found == ["rms_norm-cpu", "rms_norm-reference"]
    give_capability(monkeypatch, 9, 0)
    names = [i.name for i in registry.implementations("rms_norm", ["cuda"])]
    assert names == ["triton", "reference"]


def test_override_is_for_the_block_and_the_named_operations() -> None:
    with registry.override("reference", "linear"):
        assert registry.select("linear", CPU) is reference.linear
        assert registry.select("attention", CPU) is cpu.attention
        with registry.override("reference"):
            assert registry.select("attention", CPU) is reference.attention
        assert registry.select("attention", CPU) is cpu.attention
    assert registry.select("linear", CPU) is cpu.linear


def test_an_override_that_cannot_serve_is_an_error() -> None:
    with pytest.raises(UserError), registry.override("cpu", "linear"):
        registry.select("linear", CUDA)
    with pytest.raises(AssertionError), registry.override("gpu", "linear"):
        pass


def test_the_api_forwards_to_the_selected_function() -> None:
    seen = []
    fake = Implementation("silu_mul", "fake", ("cpu",), f"{__name__}:_never")
    registry._selected[fake.op, "cpu"] = lambda *args: seen.append(args)
    try:
        x = torch.zeros(1, 2)
        api.silu_mul(x)
        assert seen == [(x,)]
    finally:
        registry._selected.clear()
