"""Which kernels the linear layers run with on the GPU at hand, as measured: model.cache.

The file in the engine directory is JSON: {"version": 1, "devices": {name of the GPU:
{"op/tokens/outputs/inputs": [kernel, sizes…]}}}, where tokens are a bucket's largest number. The
first run on a GPU that it does not know measures; nothing is measured while prompts are answered.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.comm import World
from engine.engine_file import dump_json
from engine.kernels.triton import _tactics
from engine.kernels.triton._launch import processors
from engine.models.yi import Yi

logger = logging.getLogger("yi.tactics")

CACHE_NAME = "model.cache"
VERSION = 1
# A start is not held up for longer than this; what is left is measured by the next one.
BUDGET_SECONDS = 40.0
# Of 16 layers, more than any second-level cache holds.
MEASURED_PRODUCTS = 64

Tactics = dict[str, list[str | int]]
# tune((operation, tokens, outputs, inputs), runs, configs=…): puts the fastest into the table.
Tune = Callable[..., Any]


class Case(NamedTuple):
    """Layers of one shape, and a number of tokens to measure them with."""

    products: list[Any]
    tokens: int

    @property
    def key(self) -> tuple[str, int, int, int]:
        first = self.products[0]
        return first.op, self.tokens, first.weights.outputs, first.weights.inputs


def read_cache(path: Path) -> dict[str, Tactics]:
    """Tactics by GPU; none if there is no file, nor, after a warning, if it is damaged."""
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']!r}, not {VERSION}")
        return {str(name): dict(tactics) for name, tactics in found["devices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is ignored, it is no timing cache of this version (%r)", path, error)
        return {}


def write_cache(path: Path, devices: dict[str, Tactics]) -> None:
    """Add to what the file holds, at once or not at all; a warning if that is impossible."""
    whole = read_cache(path)
    for name, tactics in devices.items():
        whole[name] = whole.get(name, {}) | tactics
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(dump_json({"version": VERSION, "devices": whole}))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        logger.warning(
            "what was measured cannot be kept in %s (%s), so the next run measures again",
            path,
            error.strerror,
        )


def load_tactics(engine_dir: Path, device: torch.device) -> None:
    """Use what model.cache knows of this GPU."""
    known = read_cache(engine_dir / CACHE_NAME)
    _tactics.load_tactics(known.get(torch.cuda.get_device_name(device), {}))


def complete_tactics(engine_dir: Path, network: Yi, world: World, *, rows: int) -> None:
    """Measure what model.cache lacks for one token and for `rows` of them, and keep it there.

    Every rank calls it: each measures its own layers on its own GPU, and the first writes.
    """
    path, name = engine_dir / CACHE_NAME, torch.cuda.get_device_name(network.device)
    cases = find_cases(network, rows)
    if cases:
        logger.warning(
            "kernels for %d pairs of layer shape and batch are measured on %s, once: %s keeps the "
            "choice (--no_tuning chooses by rule)",
            len(cases),
            name,
            path,
        )
    found = measure(cases, network, import_module("engine.kernels.triton._tuning").tune)
    devices: dict[str, Tactics] = {}
    for theirs, tactics in world.all_gather((name, found)):
        devices.setdefault(theirs, {}).update(tactics)
    if world.rank == 0 and any(devices.values()):
        write_cache(path, devices)


def find_cases(network: Yi, rows: int) -> list[Case]:
    """What has not been measured of a network's layers, those for one token first."""
    by_shape = defaultdict(list)
    for use in network.uses():
        product: Any = use.product
        # Only Triton's products have kernels to choose from.
        if hasattr(product, "op"):
            weights = product.weights
            by_shape[product.op, weights.outputs, weights.inputs].append(product)
    buckets = sorted({1, _tactics.token_bucket(rows)})
    cases = [Case(products, tokens) for tokens in buckets for products in by_shape.values()]
    return [case for case in cases if _is_open(*case.key)]


def _is_open(op: str, tokens: int, outputs: int, inputs: int) -> bool:
    """Whether there is a choice, and nobody has measured it."""
    several = len(_tactics.candidates(op, tokens, outputs, inputs)) > 1
    return several and not _tactics.is_measured(op, tokens, outputs, inputs)


def measure(
    cases: Sequence[Case],
    network: Yi,
    tune: Tune,
    clock: Callable[[], float] = time.monotonic,
) -> Tactics:
    """The choices made, as far as the time allows.

    A kernel is measured among the others of a step, whatever these run with by then: next to its
    like it may gain from what its neighbours here do not leave, or lose.
    """
    end, before = clock() + BUDGET_SECONDS, _tactics.measured()
    for case in cases:
        if clock() >= end:
            logger.warning("measuring took long: the next run measures the rest")
            break
        configs = _tactics.short_list(*case.key, processors(network.device))
        with torch.inference_mode():
            tune(case.key, make_runs(network, case.tokens), configs=configs)
    return {key: found for key, found in _tactics.measured().items() if key not in before}


def make_runs(network: Yi, tokens: int) -> list[Callable[[], Any]]:
    """The products of some layers and of the head in a step's order, with what the model has around
    them, for random tokens; by their choices at the time of the call."""
    *blocks, last = network.uses()
    found = []
    for use in (*blocks[:MEASURED_PRODUCTS], last):
        product: Any = use.product
        if hasattr(product, "op"):
            outputs = product.weights.outputs // (2 if use.is_gated else 1)
            options = {
                "norm": use.norm,
                "is_gated": use.is_gated,
                "residual_TN": _random(tokens, outputs, network) if use.has_residual else None,
            }
            x_TK = _random(tokens, product.weights.inputs, network)
            found.append(partial(product.fused, x_TK, **options))
    return found


def _random(tokens: int, width: int, network: Yi) -> Tensor:
    return torch.randn(tokens, width, dtype=network.dtype, device=network.device)
