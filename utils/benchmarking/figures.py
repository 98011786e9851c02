"""What a timing means: rates, and their shares of what the device can do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.config import ModelConfig
from engine.quant import Algorithm, QuantConfig
from utils.benchmarking.limits import Limits
from utils.benchmarking.timing import Latency
from utils.benchmarking.traffic import Traffic, decode_flops, prefill_flops
from utils.benchmarking.workload import Workload


@dataclass(frozen=True)
class Figures:
    """Of one static batch. `tokens_per_s` counts all new tokens over the whole time, prompts
    included, as TensorRT-LLM does; `decode_*` those after the first, and is None where there are
    none. `gb_per_s` is what decoding reads, `share` that of the bandwidth; `prefill_share` is the
    prompts' share of the matrix product rate, None where that type's was not measured, and
    `prefill_part` their part of the time. Intensities are operations per byte read.
    """

    first_token_s: float
    whole_s: float
    tokens_per_s: float
    bytes_per_token: float
    decode_tokens_per_s: float | None
    gb_per_s: float | None
    share: float | None
    prefill_tokens_per_s: float
    prefill_tflops: float
    prefill_share: float | None
    prefill_part: float
    decode_intensity: float
    prefill_intensity: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def product_kind(quant: QuantConfig, dtype: str, device: str) -> str:
    """The type of matrix product that an engine's prompts are computed with."""
    if quant.algorithm is Algorithm.W8A8_SQ:
        return "int8"
    # CPUs have no FP8 products; the codes are widened.
    return "fp8" if quant.algorithm is Algorithm.FP8 and device == "cuda" else dtype


def derive(
    latency: Latency,
    work: Workload,
    *,
    config: ModelConfig,
    traffic: Traffic,
    limits: Limits,
    kind: str,
) -> Figures:
    """`kind` is the engine's `product_kind`."""
    rate = decode_rate(latency, work)
    token_bytes = traffic.token_bytes(work)
    read = None if rate is None else rate * token_bytes
    operations = prefill_flops(config, work)
    computed = operations / latency.first
    product = limits.product(kind)
    return Figures(
        first_token_s=latency.first,
        whole_s=latency.whole,
        tokens_per_s=work.batch * work.output_len / latency.whole,
        bytes_per_token=token_bytes,
        decode_tokens_per_s=rate,
        gb_per_s=None if read is None else read / 1e9,
        share=None if read is None else read / limits.bandwidth,
        prefill_tokens_per_s=work.batch * work.input_len / latency.first,
        prefill_tflops=computed / 1e12,
        prefill_share=None if product is None else computed / product,
        prefill_part=min(latency.first / latency.whole, 1.0),
        decode_intensity=decode_flops(config, work) / traffic.step_bytes(work),
        prefill_intensity=operations / traffic.weights,
    )


def decode_rate(latency: Latency, work: Workload) -> float | None:
    """Tokens per second after the first; None if there are none, or too few to tell."""
    decoding = latency.whole - latency.first
    if work.output_len == 1 or decoding <= 0:
        return None
    return work.batch * (work.output_len - 1) / decoding
