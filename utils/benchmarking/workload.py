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
    rule = "two lengths of at least 1 token with a comma between; write for example 128,2048"
    return tuple(_numbers(text, 2, f"--input_output_len '{text}' is not {rule}") for text in texts)


def parse_workloads(texts: Sequence[str]) -> tuple[Workload, ...]:
    """Of texts such as '64,128,128'; UserError for any other."""
    rule = "a batch size and two lengths of at least 1; write for example 64,128,128"
    return tuple(
        Workload(*_numbers(text, 3, f"--workload '{text}' is not {rule}")) for text in texts
    )


def _numbers(text: str, count: int, message: str) -> tuple[int, ...]:
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(numbers) != count or min(numbers) < 1:
        raise UserError(message)
    return numbers


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids, the same for the same seed."""
    source = random.Random(seed)
    return [source.choices(range(vocab_size), k=length) for _ in range(count)]
