"""Products of float8, for GPUs that have them (sm_89 and later)."""

from __future__ import annotations

from tests.kernels.linear_cases import tiles

CASES = [
    *(tiles("linear_fp8", tokens, is_gated=False) for tokens in (16, 64, 512)),
    *(tiles("linear_fp8", tokens, is_gated=True) for tokens in (16, 64, 512)),
]
