"""What an evaluation found, for people (a Markdown table), for programs (JSON) and per article."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prepare import Prepared
from utils.evaluation.task import Outcome
from utils.metrics import ROUGE_NAMES, ROUGE_TYPES, Interval, bootstrap
from utils.output import replace_file

SCHEMA_VERSION = 1
MIB = 2**20
ABSENT = "–"


@dataclass(frozen=True)
class Report:
    """Everything that one run of summarize.py found; outcomes are in the order they were made."""

    plan: EvaluationPlan
    prepared: Prepared
    outcomes: Sequence[Outcome]
    failures: tuple[str, ...] = ()

    def write(self, output_dir: str) -> None:
        """report.json, report.md, a .jsonl per side, and a chart if there are several engines."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        summary = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        page = "\n\n".join((self.to_markdown(), *self.failures))
        for name, text in (("report.json", summary), ("report.md", page)):
            with replace_file(folder / name, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        for outcome in self.outcomes:
            if outcome.answers:
                self._write_answers(folder / f"{file_name(outcome)}.jsonl", outcome)
        if len(self.plan.engine_dirs) > 1:
            from utils.evaluation.plot import draw_comparison

            draw_comparison(self.outcomes, folder / "comparison.png")

    def _write_answers(self, path: Path, outcome: Outcome) -> None:
        with replace_file(path, "w", encoding="utf-8") as file:
            for place, case in enumerate(self.prepared.task.cases):
                row: dict[str, Any] = {
                    "article": case.name,
                    "prompt_tokens": len(case.prompt),
                    "tokens": outcome.answers[place],
                    "text": outcome.texts[place],
                }
                if case.reference is not None:
                    row |= {"highlights": case.reference, **outcome.scores[place]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        task = self.prepared.task
        return {
            "schema_version": SCHEMA_VERSION,
            "eval_task": self.plan.eval_task,
            "articles": len(task.cases),
            "batch_size": task.batch_size,
            "output_len": task.rules.max_new_tokens,
            "prompt_tokens": sum(len(case.prompt) for case in task.cases),
            "decoding": asdict(task.rules.decoding),
            "notes": list(self.prepared.notes),
            "failures": list(self.failures),
            "sides": [self._side(outcome) for outcome in self.outcomes],
        }

    def _side(self, outcome: Outcome) -> dict[str, Any]:
        """One side's figures; null for what was not measured."""
        speed, likelihood, agreement = outcome.speed, outcome.likelihood, outcome.agreement
        return {
            "name": outcome.name,
            "mode": outcome.mode,
            "device": outcome.device,
            "threads": outcome.threads,
            "rouge": {name: found._asdict() for name, found in rouge_of(outcome).items()} or None,
            "rouge1_minus_transformers": self._difference(outcome),
            "perplexity": likelihood.perplexity if likelihood else None,
            "predicted_tokens": likelihood.tokens if likelihood else None,
            "agreement": agreement._asdict() if agreement else None,
            "tokens_per_second": speed.tokens_per_second if speed else None,
            "first_token_seconds": speed.first_token if speed else None,
            "new_tokens": speed.new_tokens if speed else None,
            "seconds": speed.seconds if speed else None,
            "peak_memory_bytes": outcome.memory,
        }

    def _difference(self, outcome: Outcome) -> dict[str, float] | None:
        """ROUGE-1 less transformers' on the same articles, with the interval of the mean."""
        reference = next((o for o in self.outcomes if o.is_reference), None)
        if reference is None or outcome.is_reference or not outcome.scores:
            return None
        pairs = zip(outcome.scores, reference.scores, strict=True)
        return bootstrap([own["rouge1"] - other["rouge1"] for own, other in pairs])._asdict()

    def to_markdown(self) -> str:
        task = self.prepared.task
        parts = [f"# {self.plan.eval_task}: {self._describe_task()}"]
        if any(outcome.scores for outcome in self.outcomes):
            parts.append(_table(_ROUGE_COLUMNS, self.outcomes))
        if any(outcome.likelihood or outcome.agreement for outcome in self.outcomes):
            parts.append(_table(_LIKENESS_COLUMNS, self.outcomes))
        if task.cases:
            parts.append(_table(_SPEED_COLUMNS, self.outcomes))
        parts += [f"Note: {note}" for note in self.prepared.notes]
        return "\n\n".join(parts)

    def _describe_task(self) -> str:
        task = self.prepared.task
        parts = []
        if task.cases:
            longest = max(len(case.prompt) for case in task.cases)
            parts.append(
                f"{len(task.cases)} articles, batches of {task.batch_size}, prompts of up to "
                f"{longest} tokens, up to {task.rules.max_new_tokens} new tokens"
            )
        if task.windows:
            parts.append(f"perplexity over {len(task.windows)} windows")
        return "; ".join(parts)


def rouge_of(outcome: Outcome) -> dict[str, Interval]:
    if not outcome.scores:
        return {}
    return {name: bootstrap([s[name] for s in outcome.scores]) for name in ROUGE_TYPES}


def file_name(outcome: Outcome) -> str:
    return outcome.name.replace("/", "_")


Column = tuple[str, Callable[[Outcome], str]]


def _table(columns: Sequence[Column], outcomes: Sequence[Outcome]) -> str:
    rows = [[cell(outcome) for _, cell in columns] for outcome in outcomes]
    rows = [[header for header, _ in columns], *rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def _rouge_column(name: str) -> Column:
    def cell(outcome: Outcome) -> str:
        if not outcome.scores:
            return ABSENT
        found = bootstrap([scores[name] for scores in outcome.scores])
        return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"

    return ROUGE_NAMES[name], cell


def _perplexity(outcome: Outcome) -> str:
    return f"{outcome.likelihood.perplexity:.4f}" if outcome.likelihood else ABSENT


def _identical(outcome: Outcome) -> str:
    agreement = outcome.agreement
    return f"{agreement.identical}/{agreement.cases}" if agreement else ABSENT


def _matched(outcome: Outcome) -> str:
    agreement = outcome.agreement
    if agreement is None:
        return ABSENT
    per_cent = 100 * agreement.matched / max(agreement.reference_tokens, 1)
    return f"{agreement.matched}/{agreement.reference_tokens} ({per_cent:.1f} %)"


def _first_difference(outcome: Outcome) -> str:
    if outcome.agreement is None or outcome.agreement.first is None:
        return ABSENT
    return str(outcome.agreement.first)


def _kl(outcome: Outcome) -> str:
    agreement = outcome.agreement
    return ABSENT if agreement is None or agreement.kl is None else f"{agreement.kl:.2e}"


def _tokens_per_second(outcome: Outcome) -> str:
    return f"{outcome.speed.tokens_per_second:.1f}" if outcome.speed else ABSENT


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.speed.seconds:.2f}" if outcome.speed else ABSENT


def _first_token(outcome: Outcome) -> str:
    return f"{outcome.speed.first_token * 1e3:.1f}" if outcome.speed else ABSENT


def _memory(outcome: Outcome) -> str:
    return ABSENT if outcome.memory is None else f"{outcome.memory / MIB:.0f}"


_NAMES: tuple[Column, ...] = (
    ("side", lambda outcome: outcome.name),
    ("mode", lambda outcome: outcome.mode),
)
_ROUGE_COLUMNS = (*_NAMES, *map(_rouge_column, ROUGE_TYPES))
_LIKENESS_COLUMNS: tuple[Column, ...] = (
    *_NAMES,
    ("perplexity", _perplexity),
    ("identical answers", _identical),
    ("tokens before the first difference", _matched),
    ("earliest", _first_difference),
    ("KL there (nats)", _kl),
)
_SPEED_COLUMNS: tuple[Column, ...] = (
    *_NAMES,
    ("device", lambda outcome: outcome.device),
    ("tokens/s", _tokens_per_second),
    ("total latency (s)", _seconds),
    ("first token (ms)", _first_token),
    ("peak memory (MiB)", _memory),
)
