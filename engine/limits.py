"""BuildLimits: what an engine is built to hold; fixed at build, checked at every request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import UserError


@dataclass(frozen=True)
class BuildLimits:
    """Sizes in sequences and tokens.

    `max_input_len` counts prompt tokens and `max_output_len` new tokens of one request.
    `max_num_tokens` caps the packed tokens of one step: longer prompts are prefilled in chunks
    (None: a whole batch of prompts at once). Without `paged_kv_cache` a cache block holds a whole
    sequence; with it `tokens_per_block` positions. `gather_all_token_logits` lets a run return
    the logits of prompt positions.
    """

    max_batch_size: int = 8
    max_input_len: int = 2048
    max_output_len: int = 512
    max_beam_width: int = 1
    max_num_tokens: int | None = None
    paged_kv_cache: bool = False
    tokens_per_block: int = 64
    gather_all_token_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_output_len", "max_beam_width"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.max_num_tokens is not None and self.max_num_tokens < 1:
            raise UserError(f"--max_num_tokens {self.max_num_tokens} must be at least 1")
        block = self.tokens_per_block
        if block < 1 or block & (block - 1):
            raise UserError(
                f"--tokens_per_block {block} must be a power of two, for example 64 or 128"
            )

    @property
    def max_seq_len(self) -> int:
        """Longest sequence, prompt and new tokens together."""
        return self.max_input_len + self.max_output_len

    @property
    def block_tokens(self) -> int:
        """Positions a cache block holds."""
        return self.tokens_per_block if self.paged_kv_cache else self.max_seq_len

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BuildLimits:
        return cls(**values)
