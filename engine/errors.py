"""Errors a user can cause. The scripts print them as one sentence and exit with status 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one sentence with flag or file, value, rule and remedy."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of a kind that is not supported."""


class EngineError(UserError):
    """An engine directory that is missing, damaged, or does not fit this run."""


class RequestError(UserError):
    """A request the engine cannot serve: empty, too long, or with unknown token ids."""
