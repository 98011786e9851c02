"""Makes modelopt-*: `python make_modelopt.py` with nvidia-modelopt 0.47.0, transformers 5.17.0."""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import torch
from base_model import HERE, make_model, make_prompts
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file, save_file

FP8_WITH_KV = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
FP8_WITH_KV["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]

CONFIGS = {
    "modelopt-fp8-kv": FP8_WITH_KV,
    "modelopt-int4-awq": mtq.INT4_AWQ_CFG,
    "modelopt-int8-sq": mtq.INT8_SMOOTHQUANT_CFG,
}
GOLDEN_FILE = HERE / "golden.safetensors"
# Shares its input with no other layer, so the export stores it as it was quantised.
GOLDEN_STEM = "model.layers.0.self_attn.o_proj"


def calibrate(model) -> None:
    for prompt in make_prompts():
        model(prompt)


golden = load_file(GOLDEN_FILE) if GOLDEN_FILE.exists() else {}
for name, config in CONFIGS.items():
    model = mtq.quantize(make_model(), config, calibrate)
    # Before the export, which packs the weights in place.
    linear, attention = model.get_submodule(GOLDEN_STEM), model.model.layers[0].self_attn
    golden[name] = linear.weight_quantizer(linear.weight.float()).detach()
    if name == "modelopt-int4-awq":
        torch.save(dict(model.state_dict()), HERE / "modelopt-awq-state.pt")
    if name == "modelopt-fp8-kv":
        amax = [attention.k_bmm_quantizer.amax, attention.v_bmm_quantizer.amax]
        golden[f"{name}.kv_amax"] = torch.stack(amax).float()
    export_hf_checkpoint(model, export_dir=HERE / name)
save_file(golden, GOLDEN_FILE)
