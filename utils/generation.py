"""How to decode: the flags that run.py and summarize.py share, and the engine's parameters.

Words and end tokens become ids here; what a parameter does is engine/sampling.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import UserError
from utils.tokenizer import Tokenizer, as_ids

if TYPE_CHECKING:
    from engine.sampling import SamplingParams

Words = tuple[tuple[int, ...], ...]

# Flags of a sampled choice, and the value at which each asks for nothing.
_SAMPLING_FLAGS = {"temperature": 1.0, "top_p": 0.0, "min_p": 0.0}


class FlagGroup(Protocol):
    """The part of an argument parser that declaring flags needs."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Decoding:
    """What the flags ask of decoding; the field names are the flags', the defaults
    TensorRT-LLM's."""

    min_length: int = 1
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    random_seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: int = 1

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Decoding:
        return cls(**{f.name: flags[f.name] for f in fields(cls)})

    @property
    def idle_flags(self) -> list[str]:
        """Flags that ask for sampling while `top_k` asks for the best token."""
        if self.top_k != 1:
            return []
        return [f"--{name}" for name, no in _SAMPLING_FLAGS.items() if getattr(self, name) != no]


HELP = {
    "min_length": "new tokens before an end token may come",
    "temperature": "of sampling; 0 is greedy",
    "top_k": "most probable tokens to sample from; 1 is greedy, 0 no limit",
    "top_p": "probability mass to sample from; 0 is no limit; needs --top_k other than 1",
    "min_p": "least probability to sample, as a part of the best token's; needs the same",
    "repetition_penalty": "factor for tokens of prompt and output; 1 is none",
    "presence_penalty": "subtracted from tokens that the output has",
    "frequency_penalty": "subtracted for every time that the output has a token",
    "no_repeat_ngram_size": "n-grams of this length do not come twice; 0 allows them",
    "random_seed": "the same seed gives the same samples",
    "num_beams": "beam search with this many beams, at most the engine's --max_beam_width",
    "length_penalty": "exponent of the length that divides a beam's score",
    "early_stopping": "of beam search: 1 stops at enough finished beams, 0 by a bound on the best "
    "score, another value when nothing better can come",
}


def add_decoding_flags(group: FlagGroup) -> None:
    """Declare the flags that `Decoding.from_flags` and `encode_words` read."""
    for f in fields(Decoding):
        group.add_argument(
            f"--{f.name}",
            type=type(f.default),
            default=f.default,
            help=f"{HELP[f.name]} (default: %(default)s)",
        )
    group.add_argument(
        "--end_id",
        type=int,
        nargs="+",
        metavar="ID",
        help="token ids that end an output (default: the tokenizer's and the checkpoint's)",
    )
    group.add_argument(
        "--pad_id", type=int, metavar="ID", help="token id of padding (default: the tokenizer's)"
    )
    for flag, effect in (("stop_words", "end an output"), ("bad_words", "never come")):
        group.add_argument(
            f"--{flag}",
            nargs="+",
            action="append",
            metavar="WORD",
            help=f"words that {effect}, as tokens of their own, also after a space; given once it "
            "holds for all prompts, else once per prompt",
        )


def encode_words(
    tokenizer: Tokenizer, lists: Sequence[Sequence[str]], prompts: int, flag: str
) -> tuple[Words, ...]:
    """The token sequences of each prompt's words; `lists` has one entry for all or one each."""
    if len(lists) not in (1, prompts):
        raise UserError(
            f"{flag} is given {len(lists)} times for {prompts} prompts; give it once for all of "
            "them or once per prompt"
        )
    encoded = []
    for words in lists:
        found = {word: tokenizer.word_ids(word) for word in words}
        empty = next((word for word, sequences in found.items() if not sequences), None)
        if empty is not None:
            raise UserError(f"{flag} {empty!r} has no tokens; give a word")
        encoded.append(tuple(ids for sequences in found.values() for ids in sequences))
    return tuple(encoded) if len(lists) == prompts else (encoded[0],) * prompts


def add_end_ids(
    params: Sequence[SamplingParams], generation: Mapping[str, Any]
) -> list[SamplingParams]:
    """`params` that also end at the end tokens an engine keeps from its checkpoint."""
    ids = as_ids(generation.get("eos_token_id"))
    return [replace(p, end_ids=tuple(dict.fromkeys((*p.end_ids, *ids)))) for p in params]
