"""What transformers says, the truth of the golden tests. Knows nothing of the engine.

Dimensions: S prompt positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conftest import ROOT

TINY_YI = ROOT / "models" / "tiny-yi"
# The end tokens of its generation_config.json.
END_IDS = (2, 7)
PAD_ID = 0

# Where the best two logits are closer than this, rounding may decide and there is no truth.
LEAST_MARGIN = 5e-4


class Answer(NamedTuple):
    """Greedy decoding of one prompt: new tokens, an end id included, and their raw logits."""

    tokens: list[int]
    logits_NV: Tensor

    @property
    def margin(self) -> float:
        best = self.logits_NV.topk(2).values
        return (best[:, 0] - best[:, 1]).min().item()

    def first(self, new_tokens: int) -> Answer:
        """What there was after that many tokens."""
        return Answer(self.tokens[:new_tokens], self.logits_NV[:new_tokens])


class Found(NamedTuple):
    """A hypothesis of beam search: new tokens without the end id, and the sum of the log
    probabilities, the end id's included."""

    tokens: list[int]
    log_prob: float


@cache
def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).eval()


@cache
def heldout_tokens() -> list[int]:
    """Text that tiny-yi was not trained on, as ids of its own tokenizer file."""
    codec = SentencePieceProcessor(model_file=str(TINY_YI / "tokenizer.model"))
    return codec.encode((TINY_YI / "heldout.txt").read_text(encoding="utf-8"))


def cut_prompts(lengths: Sequence[int], *, start: int = 200, gap: int = 150) -> list[list[int]]:
    """Pieces of the held-out text, `gap` tokens apart."""
    prompts = []
    for length in lengths:
        prompts.append(heldout_tokens()[start : start + length])
        start += length + gap
    return prompts


@torch.inference_mode()
def score(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits fp32 [S, V] at every position."""
    return model(torch.tensor([list(tokens)])).logits[0].float()


@torch.inference_mode()
def continue_greedily(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, end_ids: Sequence[int] = ()
) -> Answer:
    output = _generate(model, prompt, new_tokens, end_ids, output_logits=True)
    return Answer(
        output.sequences[0, len(prompt) :].tolist(), torch.stack(output.logits, 1)[0].float()
    )


@torch.inference_mode()
def search_beams(
    model: PreTrainedModel,
    prompt: Sequence[int],
    new_tokens: int,
    end_ids: Sequence[int],
    *,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = True,
) -> list[Found]:
    """The `beams` best hypotheses, best first."""
    output = _generate(
        model,
        prompt,
        new_tokens,
        end_ids,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        output_scores=True,
    )
    found = []
    scores = output.sequences_scores.tolist()
    for row, value in zip(output.sequences[:, len(prompt) :].tolist(), scores, strict=True):
        end = next((place for place, token in enumerate(row) if token in end_ids), None)
        count = len(row) if end is None else end + 1
        found.append(Found(row[:end], value * math.pow(count, length_penalty)))
    return found


def _generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    new_tokens: int,
    end_ids: Sequence[int],
    **options: Any,
) -> Any:
    tokens = torch.tensor([list(prompt)])
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(end_ids) or None,
        pad_token_id=PAD_ID,
        return_dict_in_generate=True,
        **options,
    )
