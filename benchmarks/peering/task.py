"""What every side of a comparison is given: one shape, one workload, one device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Protocol

from utils.benchmarking.dummy import DummyEngine
from utils.benchmarking.workload import Workload


@dataclass(frozen=True)
class Task:
    """`engine_dir` is our engine of that shape; `folder` is for files that a peer has to make."""

    dummy: DummyEngine
    work: Workload
    device: str
    engine_dir: str
    folder: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        values = json.loads(text)
        dummy, work = DummyEngine(**values.pop("dummy")), Workload(**values.pop("work"))
        return cls(dummy=dummy, work=work, **values)


class Absent(Exception):
    """Why a side cannot take part: it is not installed, or cannot do the task."""


class Side(Protocol):
    """A loaded model. `setup` says in a few words how it runs.

    `seconds(new_tokens)` generates exactly that many for every prompt of the task, greedily, and
    returns the seconds after the last of them is on the host.
    """

    setup: str

    def seconds(self, new_tokens: int) -> float: ...
