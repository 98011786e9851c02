"""A tensorrt_llm whose runners answer with chosen tokens and note how they were called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VOCAB = 64


class FakeRunner:
    """Answers every prompt with `answer`, and the beams after the first with a token more."""

    def __init__(self, answer: tuple[int, ...]):
        self.answer = answer
        self.opened: dict[str, Any] = {}
        self.calls: list[dict[str, Any]] = []

    def generate(self, batch_input_ids: list[torch.Tensor], **options: Any) -> Any:
        self.calls.append({"prompts": [ids.tolist() for ids in batch_input_ids], **options})
        assert all(ids.dtype == torch.int32 for ids in batch_input_ids)
        if options.get("streaming"):
            return self._steps(batch_input_ids, options)
        return self._answer(batch_input_ids, options, len(self.answer))

    def _steps(self, prompts: list[torch.Tensor], options: dict[str, Any]) -> Iterator[dict]:
        for count in range(1, len(self.answer) + 1):
            yield self._answer(prompts, options, count)

    def _answer(self, prompts: list[torch.Tensor], options: dict[str, Any], count: int) -> dict:
        beams = options.get("num_beams", 1)
        longest = max(map(len, prompts)) + count
        ids = torch.full((len(prompts), beams, longest), options["pad_id"], dtype=torch.int32)
        lengths = torch.zeros(len(prompts), beams, dtype=torch.int32)
        for row, prompt in enumerate(prompts):
            for beam in range(beams):
                tokens = [token + beam for token in self.answer[:count]]
                whole = torch.tensor([*prompt.tolist(), *tokens], dtype=torch.int32)
                ids[row, beam, : len(whole)] = whole
                lengths[row, beam] = len(whole)
        found = {"output_ids": ids, "sequence_lengths": lengths}
        if options.get("output_log_probs"):
            found["log_probs"] = torch.full((len(prompts), beams, count), -0.5)
        if options.get("output_generation_logits"):
            found["generation_logits"] = torch.ones(len(prompts), beams, count, VOCAB)
        found["context_logits"] = [torch.full((len(p), VOCAB), float(len(p))) for p in prompts]
        return found


class FakeLibrary:
    """`install` puts it in sys.modules; `runner` is what its runners' from_dir returns."""

    def __init__(self, answer: tuple[int, ...]):
        self.runner = FakeRunner(answer)

    @classmethod
    def install(
        cls,
        monkeypatch: pytest.MonkeyPatch,
        *,
        has_cpp: bool = True,
        answer: tuple[int, ...] = (5, 6, 7, 8),
    ) -> FakeLibrary:
        library = cls(answer)
        runtime, module = ModuleType("tensorrt_llm.runtime"), ModuleType("tensorrt_llm")
        module.__version__ = "0.0.fake"
        module.runtime = runtime
        runtime.ModelRunner = library.make_runner()
        runtime.SamplingConfig = PythonSettings
        if has_cpp:
            runtime.ModelRunnerCpp = library.make_cpp_runner()
        module.bindings = SimpleNamespace(executor=SimpleNamespace(SamplingConfig=CppSettings))
        monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
        monkeypatch.setitem(sys.modules, "tensorrt_llm.runtime", runtime)
        return library

    def make_runner(self) -> type:
        runner = self.runner

        class ModelRunner:
            @classmethod
            def from_dir(cls, engine_dir: str, rank: int = 0, debug_mode: bool = False):
                runner.opened = {"engine_dir": engine_dir, "rank": rank}
                return runner

        return ModelRunner

    def make_cpp_runner(self) -> type:
        runner = self.runner

        class ModelRunnerCpp:
            @classmethod
            def from_dir(
                cls,
                engine_dir: str,
                *,
                rank: int = 0,
                max_batch_size: int | None = None,
                max_input_len: int | None = None,
                max_output_len: int | None = None,
                max_beam_width: int | None = None,
                max_attention_window_size: list[int] | None = None,
            ):
                runner.opened = {k: v for k, v in locals().items() if k not in ("cls", "runner")}
                return runner

        return ModelRunnerCpp


class CppSettings:
    """Names that the executor's SamplingConfig has as properties."""

    beam_width = seed = min_tokens = repetition_penalty = presence_penalty = None
    frequency_penalty = length_penalty = early_stopping = no_repeat_ngram_size = min_p = None


@dataclass
class PythonSettings:
    """An early Python session: no min_p, and a lower bound of another name."""

    end_id: int
    pad_id: int
    num_beams: int = 1
    min_length: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: int = 1
    random_seed: int | None = None
