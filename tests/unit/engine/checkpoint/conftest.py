from __future__ import annotations

import pytest
from torch import Tensor

from tests.unit.engine.checkpoint.makers import tiny_state


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    """Tensors of an untied tiny Llama as transformers names them."""
    return tiny_state()
