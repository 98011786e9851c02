"""Rates and shares, by hand."""

from __future__ import annotations

import pytest

from engine.config import ModelConfig
from engine.quant import Algorithm, QuantConfig
from utils.benchmarking.figures import decode_rate, derive, product_kind
from utils.benchmarking.limits import Limits, combine
from utils.benchmarking.timing import Latency
from utils.benchmarking.traffic import Traffic
from utils.benchmarking.workload import Workload

CPU = Limits("cpu", copy=20e9, read=25e9, products={"bfloat16": 2e12, "int8": 4e12})
GPU = Limits("cuda", copy=20e9, read=25e9, products={"bfloat16": 2e12})


def figures(latency, work, limits=CPU, kind="bfloat16"):
    return derive(
        latency,
        work,
        config=ModelConfig(),
        traffic=Traffic(weights=1_000_000_000, kv=1_000_000),
        limits=limits,
        kind=kind,
    )


def test_figures_of_a_batch():
    work = Workload(batch=4, input_len=99, output_len=2)
    found = figures(Latency(first=0.5, whole=0.75), work)
    assert found.tokens_per_s == pytest.approx(4 * 2 / 0.75)
    # One step of 0.25 s makes 4 tokens; it reads 1 GB of weights and 4 x 100 MB of cache.
    assert found.decode_tokens_per_s == pytest.approx(16)
    assert found.bytes_per_token == pytest.approx(350e6)
    assert found.gb_per_s == pytest.approx(5.6)
    assert found.share == pytest.approx(5.6 / 25)
    assert found.prefill_tokens_per_s == pytest.approx(4 * 99 / 0.5)
    assert found.prefill_part == pytest.approx(2 / 3)


def test_a_gpu_is_compared_with_its_copy():
    work = Workload(batch=4, input_len=99, output_len=2)
    assert figures(Latency(0.5, 0.75), work, GPU).share == pytest.approx(5.6 / 20)


def test_prompts_are_compared_with_their_kind_of_product():
    work = Workload(batch=1, input_len=1, output_len=1)
    operations = 2 * (5_536_481_280 - 2 * 32 * 0) + 2 * 262_144_000 + 4 * 32 * 32 * 128
    found = figures(Latency(1.0, 1.0), work)
    assert found.prefill_tflops == pytest.approx(operations / 1e12)
    assert found.prefill_share == pytest.approx(operations / 2e12)
    assert figures(Latency(1.0, 1.0), work, kind="int8").prefill_share == pytest.approx(
        operations / 4e12
    )
    assert figures(Latency(1.0, 1.0), work, kind="fp8").prefill_share is None


@pytest.mark.parametrize(
    ("latency", "output_len"), [(Latency(0.5, 0.5), 1), (Latency(0.5, 0.4), 2)]
)
def test_no_rate_where_nothing_was_decoded_or_it_cannot_be_told(latency, output_len):
    work = Workload(1, 8, output_len)
    assert decode_rate(latency, work) is None
    found = figures(latency, work)
    assert found.decode_tokens_per_s is found.gb_per_s is found.share is None
    assert found.prefill_part <= 1


@pytest.mark.parametrize(
    ("algorithm", "device", "kind"),
    [
        (Algorithm.NONE, "cuda", "float32"),
        (Algorithm.W4A16_AWQ, "cuda", "float32"),
        (Algorithm.W8A8_SQ, "cpu", "int8"),
        (Algorithm.FP8, "cuda", "fp8"),
        (Algorithm.FP8, "cpu", "float32"),
    ],
)
def test_kind_of_product(algorithm, device, kind):
    assert product_kind(QuantConfig(algorithm), "float32", device) == kind


def test_16_bit_products_are_alike():
    assert CPU.product("float16") == CPU.product("bfloat16") == 2e12


def test_ranks_that_measure_together_add_up():
    assert combine([GPU, GPU]) == Limits("cuda", 40e9, 50e9, {"bfloat16": 4e12})
