"""transformers' side: the original checkpoint, asked the same token ids under the same rules.

Prompts of a batch are padded on the left and masked, so that a prompt gets the same answer in
every company.
"""

# Dimensions: B prompts, S padded prompt positions, V vocabulary.

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
)
from transformers.utils import logging

from engine.errors import CheckpointError, UserError
from utils import log
from utils.chat_template import read_json
from utils.evaluation.perplexity import sum_likelihood
from utils.evaluation.task import Ids, Likelihood, Rules
from utils.generation import Words

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Yi's own class of old checkpoints is Llama's under another name, with code that needs no running.
_RENAMED = {"Yi": LlamaForCausalLM}
# What it raises for files that are missing, damaged, of an unknown model or need a package.
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
_EARLY_STOPPING = {1: True, 0: False}


def load_model(
    folder: Path, *, dtype: str, device: str, device_map_auto: bool, trust_remote_code: bool
) -> PreTrainedModel:
    """The checkpoint in `folder`; CheckpointError with what transformers says against it."""
    if device_map_auto and importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "--hf_device_map_auto needs the package accelerate; install it with 'pip install "
            "accelerate' or leave the flag out"
        )
    placed = {"device_map": "auto"} if device_map_auto else {}
    kind = _RENAMED.get(read_json(folder / "config.json").get("model_type"), AutoModelForCausalLM)
    if not log.is_watched():
        logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **placed,
        )
    except LOAD_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"--hf_model_location {folder} cannot be loaded by transformers: {reason}; name a "
            "checkpoint that it loads or leave --test_hf out"
        ) from None
    return model.eval() if device_map_auto else model.to(device).eval()


class HfSide:
    """A `Side` of a transformers model."""

    def __init__(self, model: PreTrainedModel, rules: Rules):
        self._model, self._rules = model, rules
        # Sampling defaults of the checkpoint would join those asked for.
        model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def generate(self, prompts: list[Ids], max_new_tokens: int) -> list[Ids]:
        tokens_BS, mask_BS = self._pad(prompts)
        start = tokens_BS.shape[1]
        words = self._rules.stop_words
        stops = {"stopping_criteria": [StopWords(words, start)]} if words else {}
        output = self._model.generate(
            tokens_BS,
            attention_mask=mask_BS,
            generation_config=make_config(self._rules, max_new_tokens),
            **stops,
        )
        return [cut_answer(row, self._rules.end_ids, words) for row in output[:, start:].tolist()]

    @torch.inference_mode()
    def next_logits(self, context: Ids) -> Tensor:
        tokens = torch.tensor([context], device=self._model.device)
        return self._model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()

    @torch.inference_mode()
    def likelihood(self, windows: tuple[Ids, ...]) -> Likelihood:
        return sum_likelihood(self._score, windows, self._model.config.vocab_size)

    def _score(self, windows: Sequence[Ids]) -> Iterator[Tensor]:
        tokens = torch.tensor(windows, device=self._model.device)
        return iter(self._model(tokens, use_cache=False).logits)

    def _pad(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, S]; the padding is on the left."""
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        pairs = list(zip(prompts, missing, strict=True))
        tokens = [[self._rules.pad_id] * count + list(prompt) for prompt, count in pairs]
        mask = [[0] * count + [1] * len(prompt) for prompt, count in pairs]
        return tuple(torch.tensor(rows, device=self._model.device) for rows in (tokens, mask))


def make_config(rules: Rules, max_new_tokens: int) -> GenerationConfig:
    """The rules in transformers' words."""
    d = rules.decoding
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": d.num_beams,
        "do_sample": rules.is_random,
        "eos_token_id": list(rules.end_ids) or None,
        "pad_token_id": rules.pad_id,
        "repetition_penalty": d.repetition_penalty,
        "no_repeat_ngram_size": d.no_repeat_ngram_size,
        "bad_words_ids": [list(word) for word in rules.bad_words] or None,
    }
    if d.min_length > 1:
        settings["min_new_tokens"] = min(d.min_length, max_new_tokens)
    if d.num_beams > 1:
        settings["length_penalty"] = d.length_penalty
        settings["early_stopping"] = _EARLY_STOPPING.get(d.early_stopping, "never")
    if rules.is_random:
        settings |= {"temperature": d.temperature, "top_k": d.top_k, "top_p": d.top_p or 1.0}
        settings |= {"min_p": d.min_p} if d.min_p else {}
    return GenerationConfig(**settings)


class StopWords(StoppingCriteria):
    """Ends a row whose tokens after `start` end with one of the words."""

    def __init__(self, words: Words, start: int):
        self._words, self._start = words, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self._start :].tolist()
        ended = [any(_ends_with(row, word) for word in self._words) for row in rows]
        return torch.tensor(ended, device=input_ids.device)


def cut_answer(row: Sequence[int], end_ids: Ids, words: Words) -> Ids:
    """`row` up to its first end id, which is left out, or stop word, which is kept."""
    for count, token in enumerate(row, start=1):
        if token in end_ids:
            return tuple(row[: count - 1])
        if any(_ends_with(row[:count], word) for word in words):
            return tuple(row[:count])
    return tuple(row)


def _ends_with(row: Sequence[int], word: Ids) -> bool:
    return tuple(row[-len(word) :]) == word
