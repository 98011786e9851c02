"""model.cache and what is measured for it, with a tuner that measures nothing."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from engine import tactics
from engine.backends import open_engine
from engine.comm import World
from engine.kernels.triton import _tactics
from engine.kernels.triton._tactics import Config
from engine.layers.linear import Norm, Use
from tests.cli.build_runner import SMALL_DUMMY, run_here

CHOICE = ["gemv", 4, 1024, 4, 1, 1, 1, 0]
NORM = Norm(torch.ones(512), 1e-5)
OTHER = {"linear/1/128/64": ["library", 0, 0, 4, 1, 1, 1]}


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    monkeypatch.setattr(_tactics, "_table", {})


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(
        tactics.logger, "warning", lambda text, *values: found.append(text % values)
    )
    return found


class Product:
    """Keeps what it was called with."""

    def __init__(self, op, outputs, inputs):
        self.op, self.weights = op, SimpleNamespace(outputs=outputs, inputs=inputs)
        self.calls = []

    def fused(self, x_TK, **options):
        self.calls.append((x_TK, options))


def make_network(*products):
    return SimpleNamespace(
        uses=lambda: (Use(p, NORM, is_gated=True, has_residual=True) for p in products),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


class Tuner:
    """Keeps what it was asked, and takes the last configuration for the fastest."""

    def __init__(self):
        self.asked = []

    def __call__(self, key, runs, *, configs):
        self.asked.append((key, len(runs)))
        _tactics.record(*key, configs[-1])


NETWORK = make_network(
    Product("linear_int8", 96, 512),
    Product("linear_int8", 96, 512),
    Product("linear", 128, 64),
    lambda x_TK: x_TK,  # an implementation without a choice
)


def test_one_token_comes_first_and_what_is_known_is_not_measured_again():
    cases = tactics.find_cases(NETWORK, rows=6)
    assert [(len(c.products), *c.key) for c in cases] == [
        (2, "linear_int8", 1, 96, 512),
        (1, "linear", 1, 128, 64),
        (2, "linear_int8", 8, 96, 512),
        (1, "linear", 8, 128, 64),
    ]
    _tactics.load_tactics(OTHER)
    assert [c.key for c in tactics.find_cases(NETWORK, rows=1)] == [("linear_int8", 1, 96, 512)]
    # So many tokens leave no choice but the library.
    assert [c.key for c in tactics.find_cases(NETWORK, rows=256)] == [("linear_int8", 1, 96, 512)]


def test_measuring_gives_the_new_choices_and_keeps_its_time():
    _tactics.load_tactics(OTHER)
    tuner, times = Tuner(), iter((0.0, 1.0, tactics.BUDGET_SECONDS, 99.0))
    cases = tactics.find_cases(NETWORK, rows=8)
    found = tactics.measure(cases, NETWORK, tuner, clock=lambda: next(times))
    assert tuner.asked == [(("linear_int8", 1, 96, 512), 3)]
    assert list(found) == ["linear_int8/1/96/512"]


def test_a_kernel_is_measured_among_those_of_a_step():
    products = [Product("linear", 8, 4), Product("linear", 4, 4), Product("linear", 64, 4)]
    layers = products[:2] * 100
    for run in tactics.make_runs(make_network(*layers, products[2]), tokens=3):
        run()
    assert [len(product.calls) for product in products] == [32, 32, 1]
    x_TK, options = products[0].calls[0]
    assert x_TK.shape == (3, 4) and options["norm"] is NORM and options["is_gated"]
    assert options["residual_TN"].shape == (3, 4)


def test_the_first_run_measures_and_the_next_one_reads(tmp_path, monkeypatch, warnings):
    tuner = Tuner()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card A")
    monkeypatch.setattr(tactics, "import_module", lambda name: SimpleNamespace(tune=tuner))
    tactics.write_cache(tmp_path / "model.cache", {"Card B": OTHER})
    tactics.complete_tactics(tmp_path, NETWORK, World(), rows=8)
    assert len(tuner.asked) == 4 and "4 pairs" in warnings[0] and "Card A" in warnings[0]
    whole = json.loads((tmp_path / "model.cache").read_text())
    assert whole["version"] == 1
    assert whole["devices"] == {"Card A": _tactics.measured(), "Card B": OTHER}
    chosen = dict(_tactics._table)
    _tactics._table.clear()
    tactics.load_tactics(tmp_path, torch.device("cpu"))
    assert _tactics._table == chosen
    tactics.complete_tactics(tmp_path, NETWORK, World(), rows=8)
    assert len(tuner.asked) == 4 and len(warnings) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.cache"]


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '{"version": 2, "devices": {}}', '{"version": 1, "devices": {"a": 3}}'],
)
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path, warnings, text):
    path = tmp_path / "model.cache"
    path.write_text(text)
    assert tactics.read_cache(path) == {}
    assert len(warnings) == 1 and str(path) in warnings[0]


def test_no_file_is_no_mistake(tmp_path, warnings):
    assert tactics.read_cache(tmp_path / "model.cache") == {} and not warnings


def test_a_folder_that_cannot_be_written_gives_one_warning(tmp_path, monkeypatch, warnings):
    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    tactics.write_cache(tmp_path / "model.cache", {"Card A": OTHER})
    assert len(warnings) == 1 and "Permission denied" in warnings[0]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, values",
    [
        ("linear_int8/1/96/512", ["gemv", 5, 2048, 4, 1, 1, 1, 0]),
        ("linear_int8/1/96/512", ["gemv"]),
        ("linear_int8/1/96/512", 7),
        ("linear_int8/3/96/512", ["library", 0, 0, 4, 1, 1, 1]),
        ("linear_int8/x/96/512", ["library", 0, 0, 4, 1, 1, 1]),
        ("linear_int8/96", ["library", 0, 0, 4, 1, 1, 1]),
        ("conv/1/96/512", ["library", 0, 0, 4, 1, 1, 1]),
    ],
)
def test_what_is_no_candidate_is_left_out(name, values):
    _tactics.load_tactics({name: values})
    assert _tactics.measured() == {}


@pytest.mark.parametrize("op", _tactics.OPS)
@pytest.mark.parametrize("tokens", [1, 8, 64, 128, 512])
def test_the_short_list_is_short_has_the_default_and_can_be_read_back(op, tokens):
    shape = (op, tokens, 4096, 11008)
    configs = _tactics.short_list(*shape, 132)
    assert 1 <= len(configs) <= 10 and len(set(configs)) == len(configs)
    assert _tactics.choose(*shape, 132) in configs
    for config in configs:
        _tactics.record(*shape, config)
        kept = _tactics.measured()
        _tactics._table.clear()
        _tactics.load_tactics(json.loads(json.dumps(kept)))
        assert _tactics.choose(*shape, 132) == config and isinstance(config, Config)


def test_an_engine_takes_a_timing_cache_along(tmp_path):
    given, output = tmp_path / "given.cache", tmp_path / "engine"
    tactics.write_cache(given, {"Card A": OTHER})
    flags = (*SMALL_DUMMY, "--output_dir", output, "--timing_cache", given, "--dtype", "float32")
    assert run_here(*flags, "--log_level", "error").status == 0
    assert tactics.read_cache(output / "model.cache") == {"Card A": OTHER}
    # Four projections of each of two layers, and the head.
    network = open_engine(output, World(), device="cpu", tuning=True)._network
    assert len(list(network.uses())) == 9
    assert tactics.find_cases(network, rows=4) == []
