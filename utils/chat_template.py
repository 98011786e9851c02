"""Chat templates: where a model folder keeps its own, and how messages become one prompt text.

Templates come with checkpoints, so they run in Jinja's sandbox and see nothing but the messages
and the names of the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine.errors import UserError

Message = Mapping[str, str]


class ChatTemplate(NamedTuple):
    """Jinja source and the file it came from."""

    source: str
    where: str


def find_chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The folder's template: a file of its own, then tokenizer_config.json (`settings`), then
    generation_config.json; None if it has none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return ChatTemplate(jinja.read_text(encoding="utf-8"), str(jinja))
    candidates = (
        ("chat_template.json", read_json(folder / "chat_template.json")),
        ("tokenizer_config.json", settings),
        ("generation_config.json", read_json(folder / "generation_config.json")),
    )
    for name, content in candidates:
        source = _default_of(content.get("chat_template"))
        if source:
            return ChatTemplate(source, str(folder / name))
    return None


def _default_of(entry: Any) -> str | None:
    """An entry is the template itself or a list of named ones."""
    if isinstance(entry, list):
        named = {one.get("name"): one.get("template") for one in entry if isinstance(one, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt text of `messages` (role, content); `tokens` are bos_token, eos_token and so on.

    UserError, naming the template's file, if it is faulty or refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The options that transformers documents for chat templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template.source).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens
        )
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"{template.where}: the chat template fails ({error}); correct it or run without --chat"
        ) from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(reason: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(reason)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty if there is no such file; UserError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; fetch the file again")
    return content
