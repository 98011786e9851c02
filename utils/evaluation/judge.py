"""Turning answers into texts and scores while a side works, for its user's eyes and the report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from utils import log
from utils.evaluation.task import Case, Ids
from utils.metrics import Rouge, Scores
from utils.tokenizer import Tokenizer


class Judge:
    """Told the answers of one side, batch by batch, in the order of the cases.

    `rouge` is None if the cases have no references. Used as a context, which holds the progress
    bar; `texts` and `scores` are whole at its end.
    """

    def __init__(self, name: str, cases: Sequence[Case], tokenizer: Tokenizer, rouge: Rouge | None):
        self.texts: list[str] = []
        self.scores: list[Scores] = []
        self._cases, self._tokenizer, self._rouge = cases, tokenizer, rouge
        self._bar = log.ProgressBar(name, unit="article")

    def __enter__(self) -> Judge:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)

    def see(self, answers: Sequence[Ids]) -> None:
        cases = self._cases[len(self.texts) : len(self.texts) + len(answers)]
        texts = [self._tokenizer.decode(answer).strip() for answer in answers]
        self.texts += texts
        if self._rouge is not None:
            self.scores += self._rouge.score(texts, [case.reference or "" for case in cases])
            running = statistics.fmean(scores["rouge1"] for scores in self.scores)
            self._bar.note(f"ROUGE-1 {running:.1f}")
        self._bar.update_to(len(self.texts), len(self._cases))
