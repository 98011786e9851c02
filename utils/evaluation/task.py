"""What both sides are asked, as token ids, and what they give: shared by the other modules.

Nothing here knows an engine, transformers, a data set or a flag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from utils.generation import Decoding, Words
from utils.metrics import Scores

if TYPE_CHECKING:
    from torch import Tensor

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One prompt, and the text that an answer is scored against, if there is one."""

    name: str
    prompt: Ids
    reference: str | None = None


@dataclass(frozen=True)
class Rules:
    """How an answer grows and when it ends."""

    decoding: Decoding
    max_new_tokens: int
    end_ids: Ids
    pad_id: int
    stop_words: Words = ()
    bad_words: Words = ()

    @property
    def is_random(self) -> bool:
        d = self.decoding
        return d.num_beams == 1 and d.top_k != 1 and d.temperature != 0


@dataclass(frozen=True)
class Task:
    """The cases to answer, `batch_size` at a time, and the token windows whose likelihood is
    measured; either may be empty."""

    cases: tuple[Case, ...]
    rules: Rules
    batch_size: int
    windows: tuple[Ids, ...] = ()


class Likelihood(NamedTuple):
    """The summed negative log probability (nats) of `tokens` predicted tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)


class Speed(NamedTuple):
    """Seconds of generating `new_tokens` (end tokens not counted), warm-up excluded; `first_token`
    is the median over batches of what a batch takes for its prompts and one token each."""

    new_tokens: int
    seconds: float
    first_token: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


class Divergence(NamedTuple):
    """Where an answer leaves its reference answer: after `prefix` tokens they share."""

    case: int
    prefix: int


class Agreement(NamedTuple):
    """How far the tokens of two sides are the same.

    `matched` of `reference_tokens` come before a case's first difference; `first` is the earliest
    of those, in tokens. `kl` is the mean over `kl_cases` divergences of KL(reference ‖ engine) in
    nats, for the token at which they part.
    """

    cases: int
    identical: int
    matched: int
    reference_tokens: int
    first: int | None
    kl: float | None
    kl_cases: int


@dataclass(frozen=True)
class Outcome:
    """What one side gave. `scores` has an entry per case that has a reference, `memory` counts
    bytes over all ranks, `parting_logits` are fp32 [V] after a divergence's shared tokens."""

    name: str
    mode: str
    is_reference: bool = False
    answers: tuple[Ids, ...] = ()
    texts: tuple[str, ...] = ()
    scores: tuple[Scores, ...] = ()
    likelihood: Likelihood | None = None
    speed: Speed | None = None
    memory: int | None = None
    threads: int = 1
    device: str = "cpu"
    agreement: Agreement | None = None
    parting_logits: dict[Divergence, Tensor] = field(default_factory=dict)


class Side(Protocol):
    """An engine or a transformers model that answers; every rank of an engine's job calls it."""

    def generate(self, prompts: list[Ids], max_new_tokens: int) -> list[Ids]:
        """The best continuation of each prompt, without its end token."""

    def next_logits(self, context: Ids) -> Tensor | None:
        """fp32 [V] on the CPU for the token after `context`; None if it is too long."""

    def likelihood(self, windows: tuple[Ids, ...]) -> Likelihood:
        """Of every token of each window but its first."""
