"""The quantisation settings of a checkpoint, with the file they stand in and refusals by name.

Knows how settings are worded, not what any format does with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """Settings found in `file`; `prefix` is the place of `values` in it, for messages."""

    file: str
    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def section(self, key: str) -> Settings:
        """A nested object of settings; absent or null is an empty one."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.refusal(key, "an object of settings", "write the file again")
        return Settings(self.file, value, f"{self.prefix}{key}.")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; absent or null is an empty one."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.refusal(key, "a list of names", "write the file again")
        return tuple(value)

    def require(self, key: str, allowed: Sequence[Any], remedy: str, default: Any = None) -> Any:
        """The value, which must be one of `allowed`, or CheckpointError."""
        value = self.get(key, default)
        # True == 1 in Python, but not in a settings file.
        if not any(value == known and type(value) is type(known) for known in allowed):
            known = ", ".join("null" if one is None else str(one) for one in allowed)
            raise self.refusal(key, known, remedy, default)
        return value

    def refusal(
        self, key: str, supported: str, remedy: str, default: Any = None
    ) -> CheckpointError:
        value = self.get(key, default)
        return CheckpointError(
            f"{self.file}: {self.prefix}{key} {value!r} is not supported (supported: {supported}); "
            f"{remedy}"
        )


def find_left_out(
    settings: Settings, key: str, stems: Sequence[str], is_left_out: Callable[[str], bool]
) -> bool:
    """Whether `key` leaves all linear layers unquantised; CheckpointError if it does so with some.

    The engine stores all linear layers of a model in one way.
    """
    left_out = [stem for stem in stems if is_left_out(stem)]
    if left_out and len(left_out) < len(stems):
        raise CheckpointError(
            f"{settings.file}: {settings.prefix}{key} leaves {left_out[0]} (and "
            f"{len(left_out) - 1} of the other {len(stems) - 1} linear layers) unquantised, but "
            "the linear layers of an engine are all stored alike; quantise the model again with "
            "all of them"
        )
    return bool(left_out)


def compile_pattern(settings: Settings, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{settings.file}: {settings.prefix}{key} holds {pattern!r}, which is not a regular "
            f"expression ({error}); correct the file"
        ) from None
