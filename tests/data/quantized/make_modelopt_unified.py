"""Makes modelopt-unified-*: `python make_modelopt_unified.py` with nvidia-modelopt 0.47.0,
transformers 5.17.0."""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import torch
from base_model import HERE, make_model, make_prompts
from modelopt.torch.export import export_tensorrt_llm_checkpoint

INT8_KV = {
    "quantizer_name": "*[kv]_bmm_quantizer",
    "cfg": {"num_bits": 8, "axis": None},
    "enable": True,
}
SQ_WITH_KV = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
SQ_WITH_KV["quant_cfg"].append(INT8_KV)

# Name → what is quantised, and the number of tensor-parallel ranks.
CONFIGS = {
    "modelopt-unified-fp8": (mtq.FP8_DEFAULT_CFG, 1),
    "modelopt-unified-fp8-tp2": (mtq.FP8_DEFAULT_CFG, 2),
    "modelopt-unified-int4-awq": (mtq.INT4_AWQ_CFG, 1),
    "modelopt-unified-int8-sq-kv": (SQ_WITH_KV, 1),
}


def calibrate(model) -> None:
    for prompt in make_prompts():
        model(prompt)


for name, (config, ranks) in CONFIGS.items():
    model = mtq.quantize(make_model(), config, calibrate)
    export_tensorrt_llm_checkpoint(
        model,
        decoder_type="llama",
        dtype=torch.bfloat16,
        export_dir=HERE / name,
        inference_tensor_parallel=ranks,
    )
