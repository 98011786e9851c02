"""vLLM as a side of a comparison, with its own random weights of the same shape."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.peering.task import Absent, Task
from engine.config import ModelConfig
from utils.benchmarking.workload import random_prompts

# Of the GPU's memory; the engine that it is compared with has the rest.
MEMORY_SHARE = 0.45


class Vllm:
    """See `task.Side`."""

    def __init__(self, task: Task):
        try:
            import vllm
        except ImportError:
            raise Absent("vllm is not installed") from None
        if task.device != "cuda":
            raise Absent("vllm is compared on GPUs only")
        work, config = task.work, task.dummy.config
        folder = Path(task.folder) / "vllm"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config(config)))
        quantisation = "fp8" if task.dummy.quant == "fp8" else None
        self._model = vllm.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=task.dummy.dtype,
            quantization=quantisation,
            max_model_len=work.input_len + work.output_len,
            max_num_seqs=work.batch,
            gpu_memory_utilization=MEMORY_SHARE,
            # The same prompts come again and are to be computed again.
            enable_prefix_caching=False,
        )
        self._prompts = [
            {"prompt_token_ids": prompt}
            for prompt in random_prompts(work.batch, work.input_len, config.vocab_size)
        ]
        self._params = vllm.SamplingParams
        self.setup = f"vllm {vllm.__version__}, {task.dummy.dtype}"
        self.setup += f", {quantisation}" if quantisation else ""

    def seconds(self, new_tokens: int) -> float:
        params = self._params(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self._model.generate(self._prompts, params, use_tqdm=False)
        return time.perf_counter() - start


def hf_config(config: ModelConfig) -> dict:
    """config.json of a Hugging Face checkpoint of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": config.hidden_act,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
