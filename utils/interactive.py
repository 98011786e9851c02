"""The interactive run: prompts typed on rank 0, answers printed as they come."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from engine.errors import RequestError
from utils.prompts import system_message, user_message
from utils.request import on_root
from utils.run_plan import PromptSource, RunPlan
from utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.comm import World
    from engine.sampling import SamplingParams
    from engine.session import Session

# mpirun does not always pass the end of the input on, so there is a word for it.
EXIT = "/exit"
GREETING = f"One prompt a line; {EXIT} or Ctrl-D ends."
PROMPT = "> "


class Prompter:
    """Turns typed lines into prompts and, in a chat, keeps what has been said."""

    def __init__(self, tokenizer: Tokenizer, source: PromptSource, max_input_len: int):
        self._tokenizer = tokenizer
        self._source = source
        self._limit = min(max_input_len, source.max_tokens or max_input_len)
        self._messages = system_message(source.system_prompt)
        self._first = len(self._messages)

    def read(self) -> list[int] | None:
        """The next prompt's ids, None at the end of the input."""
        while (line := _read_line()) not in (None, EXIT):
            if line.strip():
                return self._chat(line) if self._source.chat else self._continue(line)
        return None

    def keep_answer(self, text: str) -> None:
        if self._source.chat:
            self._messages.append({"role": "assistant", "content": text})

    def drop_question(self) -> None:
        """Forget the last line, to which there was no answer."""
        if self._source.chat:
            self._messages.pop()

    def _continue(self, line: str) -> list[int]:
        ids = self._tokenizer.encode(line, add_special_tokens=self._source.add_special_tokens)
        return ids if self._source.max_tokens is None else ids[-self._source.max_tokens :]

    def _chat(self, line: str) -> list[int]:
        """The whole chat, without its oldest turns if the engine has no room for them."""
        self._messages.append(user_message(line))
        ids = self._tokenizer.apply_chat_template(self._messages)
        while len(ids) > self._limit and len(self._messages) > self._first + 1:
            del self._messages[self._first : self._first + 2]
            ids = self._tokenizer.apply_chat_template(self._messages)
        return ids


def _read_line() -> str | None:
    if sys.stdin.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def run_interactive(
    session: Session,
    world: World,
    plan: RunPlan,
    params: SamplingParams,
    tokenizer: Tokenizer | None,
) -> None:
    """Answer typed prompts until the input ends. `tokenizer` is None on ranks other than 0."""
    prompter = None
    if tokenizer is not None:
        prompter = Prompter(tokenizer, plan.prompts, session.info.limits.max_input_len)
        if sys.stdin.isatty():
            print(GREETING)
    while (ids := on_root(world, lambda: prompter.read())) is not None:
        try:
            answer = _answer(session, ids, params, plan.streaming_interval, tokenizer)
        except RequestError as error:
            if prompter is not None:
                print(error, file=sys.stderr)
                prompter.drop_question()
            continue
        if prompter is not None:
            prompter.keep_answer(answer)


def _answer(
    session: Session,
    ids: list[int],
    params: SamplingParams,
    interval: int,
    tokenizer: Tokenizer | None,
) -> str:
    """Print the continuation of `ids` as it comes and return its text (both on rank 0 only)."""
    if params.num_beams > 1:
        # Until the end, a beam can still become another one.
        lists = iter([session.generate([ids], [params])])
    else:
        lists = session.stream([ids], [params], interval)
    decoder = None if tokenizer is None else tokenizer.stream()
    parts: list[str] = []
    done = 0
    for results in lists:
        tokens = results[0].beams[0].tokens
        if decoder is not None:
            parts.append(decoder.push(tokens[done:]))
            print(parts[-1], end="", flush=True)
            done = len(tokens)
    if decoder is not None:
        parts.append(decoder.finish())
        print(parts[-1], flush=True)
    return "".join(parts)
