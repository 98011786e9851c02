"""transformers as a side of a comparison: on a GPU with a static cache and a compiled decode step,
as its documentation advises for speed; on a CPU as it comes."""

from __future__ import annotations

import gc
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peering.task import Absent, Task
from engine.comm import World
from engine.config import ModelConfig
from engine.threads import share_threads
from utils.benchmarking.workload import random_prompts

# Random weights are within this of 0.
SPREAD = 0.02
logger = logging.getLogger("yi.peers")


class Transformers:
    """See `task.Side`."""

    def __init__(self, task: Task):
        try:
            import transformers
        except ImportError:
            raise Absent("transformers is not installed") from None
        share_threads(World())
        work, config = task.work, task.dummy.config
        dtype = getattr(torch, task.dummy.dtype)
        self._device = torch.device(task.device)
        self._model = make_model(config, dtype, self._device)
        prompts = random_prompts(work.batch, work.input_len, config.vocab_size)
        self._prompts_BT = torch.tensor(prompts, device=self._device)
        # transformers renamed the argument.
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._static: Any = None
        self._step: Callable[..., Tensor] = self._forward
        self.setup = f"transformers {transformers.__version__}, {task.dummy.dtype}, sdpa"
        if self._device.type == "cuda":
            self._compile(transformers, work.input_len + work.output_len)

    @torch.no_grad()
    def seconds(self, new_tokens: int) -> float:
        start = time.perf_counter()
        self._generate(new_tokens).cpu()
        return time.perf_counter() - start

    def _generate(self, new_tokens: int) -> Tensor:
        """int64 [B, new tokens]."""
        cache = self._fresh_cache()
        length = self._prompts_BT.shape[1]
        positions_1T = torch.arange(length, device=self._device)[None]
        token_B1 = self._forward(self._prompts_BT, positions_1T, cache)
        tokens = [token_B1]
        position_11 = positions_1T[:, -1:]
        for _ in range(new_tokens - 1):
            position_11 = position_11 + 1
            # A compiled step returns its own buffer, which the next one overwrites.
            token_B1 = self._step(token_B1, position_11, cache).clone()
            tokens.append(token_B1)
        return torch.cat(tokens, 1)

    def _forward(self, tokens_BT: Tensor, positions_1T: Tensor, cache: Any) -> Tensor:
        """The next token of each row, int64 [B, 1]."""
        options = {self._cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        logits_B1V = self._model(tokens_BT, position_ids=positions_1T, **options).logits
        return logits_B1V[:, -1].argmax(-1, keepdim=True)

    def _fresh_cache(self) -> Any:
        if self._static is not None:
            self._static.reset()
            return self._static
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _compile(self, transformers: Any, length: int) -> None:
        """Falls back on what works, and says so."""
        self._static = transformers.StaticCache(config=self._model.config, max_cache_len=length)
        self._step = torch.compile(self._forward, mode="reduce-overhead", fullgraph=True)
        try:
            self.seconds(4)
            self.setup += ", static cache, compiled"
        except Exception as error:
            logger.warning("torch.compile failed for transformers: %s", error)
            self._static, self._step = None, self._forward
            self.setup += f", not compiled ({type(error).__name__})"
            gc.collect()


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """LlamaForCausalLM of the shape with random weights, made without initialising twice."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(hf_config)
    model = model.to(dtype).to_empty(device=device).eval()
    # Its tables are buffers of computed values, which an empty tensor does not have.
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(hf_config)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.fill_(1.0)
        else:
            weight.data.uniform_(-SPREAD, SPREAD)
    return model
