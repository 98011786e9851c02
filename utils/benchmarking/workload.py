"""What is measured: static batches of random prompts and a fixed number of new tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UserError


@dataclass(frozen=True)
class Workload:
    """`batch` prompts of `input_len` tokens that are given `output_len` new ones each."""

    batch: int
    input_len: int
    output_len: int

    @property
    def mean_context(self) -> float:
        """Positions that a sequence's attention reads in a decode step, on average over the steps.

        The first new token comes from the prompt; step i = 1 … output_len - 1 reads
        input_len + i.
        """
        return self.input_len + self.output_len / 2

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.input_len}/{self.output_len} tokens"


def parse_lengths(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(input, output) lengths of texts such as '128,2048'; UserError for any other."""
    pairs = []
    for text in texts:
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
        if len(numbers) != 2 or min(numbers) < 1:
            raise UserError(
                f"--input_output_len '{text}' is not two lengths of at least 1 token with a comma "
                "between; write for example 128,2048"
            )
        pairs.append((numbers[0], numbers[1]))
    return tuple(pairs)


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids, the same for the same seed."""
    source = random.Random(seed)
    return [source.choices(range(vocab_size), k=length) for _ in range(count)]
