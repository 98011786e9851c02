"""Makes compressed-tensors-*: `python make_compressed_tensors.py` with llmcompressor 0.14.0.1,
compressed-tensors 0.19.0 and transformers 5.17.0.
"""

from __future__ import annotations

import torch
from base_model import HERE, make_prompts
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN_FILE = HERE / "golden.safetensors"
GOLDEN_STEM = "model.layers.0.self_attn.k_proj"
KV = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
# Asked for, but not used: the rows are token ids.
PROCESSOR = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), pad_token="<unk>"
)


def preset(name: str, **weights) -> dict[str, QuantizationScheme]:
    scheme = preset_name_to_scheme(name, ["Linear"])
    if weights:
        scheme.weights = scheme.weights.model_copy(update=weights)
    return {"group_0": scheme}


MODIFIERS = {
    "w4a16": {"config_groups": preset("W4A16")},
    "w4a16-asym": {"config_groups": preset("W4A16_ASYM")},
    "w4a16-channel": {"config_groups": preset("W4A16", strategy="channel", group_size=None)},
    "w8a8": {"config_groups": preset("W8A8"), "kv_cache_scheme": {**KV, "type": "int"}},
    "fp8-dynamic": {"config_groups": preset("FP8_DYNAMIC")},
    "fp8-static": {
        "config_groups": preset("FP8"),
        "kv_cache_scheme": {**KV, "type": "float", "strategy": "attn_head"},
    },
}

golden = load_file(GOLDEN_FILE) if GOLDEN_FILE.exists() else {}
rows = [{"input_ids": p[0].tolist(), "attention_mask": [1] * p.shape[1]} for p in make_prompts()]
for name, settings in MODIFIERS.items():
    # From a folder: llm-compressor copies files that lie beside the weights.
    model = LlamaForCausalLM.from_pretrained(HERE / "base")
    folder = HERE / f"compressed-tensors-{name}"
    modifier = QuantizationModifier(ignore=["lm_head"], **settings)
    oneshot(model=model, recipe=modifier, dataset=Dataset.from_list(rows), processor=PROCESSOR)
    scheme = model.get_submodule(GOLDEN_STEM).quantization_scheme
    model.save_pretrained(folder, save_compressed=True)
    stored = load_file(folder / "model.safetensors")
    stem = GOLDEN_STEM + "."
    parts = {k.removeprefix(stem): v for k, v in stored.items() if k.startswith(stem)}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    golden[folder.name] = compressor.decompress(parts, scheme)["weight"].to(torch.bfloat16)
save_file(golden, GOLDEN_FILE)
