"""Mapping: which part of the model a rank holds. All divisibility rules of tp and pp live here.

Rank layout as in TensorRT-LLM: rank = pp_rank * tp + tp_rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.config import ModelConfig
from engine.errors import UserError


class Span(NamedTuple):
    """Half-open range of heads, channels or rows."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class LocalShape:
    """One rank's share of the widths. `vocab` counts rows after padding to a multiple of tp."""

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


@dataclass(frozen=True)
class Mapping:
    """Place of one rank among tp × pp."""

    world: int = 1
    rank: int = 0
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if min(self.world, self.tp, self.pp) < 1:
            raise UserError(
                f"--world_size {self.world}, --tp_size {self.tp} and --pp_size {self.pp} must be "
                "at least 1"
            )
        if self.tp * self.pp != self.world:
            raise UserError(
                f"--tp_size {self.tp} times --pp_size {self.pp} is {self.tp * self.pp} but "
                f"--world_size is {self.world}; make them equal"
            )
        assert 0 <= self.rank < self.world

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def at(self, rank: int) -> Mapping:
        """The same layout seen from another rank."""
        return Mapping(self.world, rank, self.tp, self.pp)

    def ranks(self) -> Iterator[Mapping]:
        return (self.at(rank) for rank in range(self.world))

    def check(self, config: ModelConfig, *, embedding_dim: int | None = None) -> None:
        """Raise UserError unless `config` can be cut tp × pp ways.

        `embedding_dim` is the sharded dimension of the embedding table (0 vocabulary, 1 hidden),
        or None for a replicated table.
        """
        rules = [
            ("attention heads (num_attention_heads)", config.num_heads),
            ("MLP channels (intermediate_size)", config.intermediate_size),
        ]
        if embedding_dim == 1:
            rules.append(("hidden channels (hidden_size)", config.hidden_size))
        for what, size in rules:
            if size % self.tp:
                raise UserError(
                    f"--tp_size {self.tp} does not divide the model's {size} {what}; "
                    f"choose one of {_divisors(size)}"
                )
        larger, smaller = max(config.num_kv_heads, self.tp), min(config.num_kv_heads, self.tp)
        if larger % smaller:
            raise UserError(
                f"--tp_size {self.tp} neither divides nor is a multiple of the model's "
                f"{config.num_kv_heads} KV heads (num_key_value_heads); choose one that does"
            )
        if self.pp > config.num_layers:
            raise UserError(
                f"--pp_size {self.pp} exceeds the model's {config.num_layers} layers; "
                "every stage needs at least one layer"
            )

    def layer_span(self, config: ModelConfig) -> Span:
        """Global layers of this stage: near-equal, the first stages take the remainder.

        The last stage also computes the head, so it is never the larger one.
        """
        size, rest = divmod(config.num_layers, self.pp)
        start = self.pp_rank * size + min(self.pp_rank, rest)
        return Span(start, start + size + (self.pp_rank < rest))

    def layers(self, config: ModelConfig) -> Iterator[tuple[int, int]]:
        """(slot, layer): local and global index of each layer of this stage."""
        return enumerate(range(*self.layer_span(config)))

    def local(self, config: ModelConfig) -> LocalShape:
        return LocalShape(
            heads=config.num_heads // self.tp,
            kv_heads=max(config.num_kv_heads // self.tp, 1),
            head_dim=config.head_dim,
            ffn=config.intermediate_size // self.tp,
            vocab=-(-config.vocab_size // self.tp),
        )

    def head_span(self, config: ModelConfig) -> Span:
        return self._span(config.num_heads // self.tp)

    def kv_head_span(self, config: ModelConfig) -> Span:
        """KV heads of this rank; with tp > kv_heads several ranks hold the same one."""
        if self.tp <= config.num_kv_heads:
            return self._span(config.num_kv_heads // self.tp)
        head = self.tp_rank * config.num_kv_heads // self.tp
        return Span(head, head + 1)

    def even_span(self, size: int) -> Span:
        """This rank's part of `size` channels, rounded up: the last parts may overrun `size`."""
        return self._span(-(-size // self.tp))

    def _span(self, share: int) -> Span:
        return Span(self.tp_rank * share, (self.tp_rank + 1) * share)


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, 65) if size % n == 0)
