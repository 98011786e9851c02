"""What a block has around a product, for kernels that do it in the same pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Around(NamedTuple):
    """RMSNorm before the product (weight [K], epsilon), the gate after it (gate's rows before
    up's), the residual [T, N] added to it. Products of nibbles may have a factor fp32 [K] of the
    tokens in place of a norm."""

    norm: tuple[Tensor, float] | None = None
    is_gated: bool = False
    residual_TN: Tensor | None = None
    factor_K: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor | None, float, bool]:
        """What multiplies the inputs [K] or None, epsilon, and whether it is a norm's weight."""
        norm_K, eps = self.norm or (None, 0.0)
        return (self.factor_K if norm_K is None else norm_K), eps, norm_K is not None


PLAIN = Around()
