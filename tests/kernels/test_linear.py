from __future__ import annotations

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.registry import Implementation
from tests.kernels.helpers import DTYPES, TOLERANCES, assert_close, cases, random


@cases("linear")
@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 130])
@pytest.mark.parametrize("outputs, inputs", [(64, 64), (97, 33), (1, 5001), (5001, 1), (192, 1024)])
def test_linear(
    impl: Implementation, device: str, dtype: torch.dtype, tokens: int, outputs: int, inputs: int
) -> None:
    x = random(tokens, inputs, dtype=dtype, device=device)
    w = random(outputs, inputs, dtype=dtype, device=device, seed=1)
    y = impl(x, w)
    assert y.dtype == dtype and y.shape == (tokens, outputs)
    if tokens:
        assert_close(y, x.double() @ w.double().T)


@cases("linear")
@DTYPES
def test_rows_of_a_larger_tensor(impl: Implementation, device: str, dtype: torch.dtype) -> None:
    x = random(3, 128, dtype=dtype, device=device)[1:2, :64]
    w = random(40, 64, dtype=dtype, device=device, seed=1)
    assert_close(impl(x, w), x.double() @ w.double().T)


def test_fp16_weights_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CONVERTED_ELEMENTS", 33 * 10 + 5)
    tokens = cpu.NATIVE_TOKENS[torch.float16] + 1
    x, w = random(tokens, 33, dtype=torch.float16), random(97, 33, dtype=torch.float16, seed=1)
    assert_close(cpu.linear(x, w), x.double() @ w.double().T)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_fp16_accumulates_in_fp32(tokens: int) -> None:
    """A sum of 4096 terms that fp16 additions would lose: 2048 + 1 + … stays 2048 there."""
    x = torch.ones(tokens, 4096, dtype=torch.float16)
    w = torch.cat([torch.full((1, 1), 2048.0), torch.ones(1, 4095)], dim=1).half()
    assert cpu.linear(x, w).tolist() == [[6144.0]] * tokens


@pytest.mark.parametrize("enabled", [True, False])
def test_the_onednn_flag_is_restored(enabled: bool) -> None:
    before = torch.backends.mkldnn.enabled
    x, w = random(1, 8, dtype=torch.bfloat16), random(4, 9, dtype=torch.bfloat16)
    torch.backends.mkldnn.enabled = enabled
    try:
        cpu.linear_without_onednn(x, w[:, :8])
        assert torch.backends.mkldnn.enabled == enabled
        with pytest.raises(RuntimeError):
            cpu.linear_without_onednn(x, w)
        assert torch.backends.mkldnn.enabled == enabled
    finally:
        torch.backends.mkldnn.enabled = before


def test_tolerances_cover_every_dtype() -> None:
    assert set(TOLERANCES) == {torch.float32, torch.float16, torch.bfloat16}
