"""8-bit linear layers stored plainly: int8 or float8 codes beside their scales.

The layout that compressed-tensors and ModelOpt have in common; their settings they read
themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoint.quant_scales import SCALE_DTYPES, read_largest, read_scale
from engine.checkpoint.quantised import Field, LinearFormat, StoredLinear, meta
from engine.errors import CheckpointError
from engine.quant import Algorithm, QuantConfig
from engine.weights.types import Fp8, Int8

CODE_DTYPES = {Algorithm.W8A8_SQ: torch.int8, Algorithm.FP8: torch.float8_e4m3fn}
ONE_VALUE = ((1,), (), (1, 1))

PRE_QUANT_SCALE = "pre_quant_scale"


class EightBit(LinearFormat):
    """weight codes [N, K]; weight_scale per output (`quant.per_channel`) or one; input_scale one
    (unless `quant.per_token`); pre_quant_scale [K], the factor of the input, if `is_smoothed`.
    """

    def __init__(
        self,
        quant: QuantConfig,
        kv_names: tuple[tuple[str, str], ...],
        *,
        is_smoothed: bool = False,
    ) -> None:
        self.quant, self.kv_names, self.is_smoothed = quant, kv_names, is_smoothed

    def fields(self, outputs: int, inputs: int) -> dict[str, Field]:
        scale_shapes = ((outputs, 1), (outputs,)) if self.quant.per_channel else ONE_VALUE
        fields = {
            "weight": Field(((outputs, inputs),), (CODE_DTYPES[self.quant.algorithm],)),
            "weight_scale": Field(scale_shapes, SCALE_DTYPES),
        }
        if not self.quant.per_token:
            fields["input_scale"] = Field(ONE_VALUE, SCALE_DTYPES)
        if self.is_smoothed:
            fields[PRE_QUANT_SCALE] = Field(((inputs,),), SCALE_DTYPES)
        return fields

    def unpack(self, linear: StoredLinear) -> Int8 | Fp8:
        """Layers that share an activation share its scale, the largest of theirs: only the grid
        of the activation widens, and calibration on one input made them equal anyway.
        """
        codes_NK = linear.read("weight")
        scale_N = read_scale(linear.tensors["weight_scale"]).reshape(-1)
        scale_N = scale_N.expand(linear.outputs).contiguous()
        input_scale = None
        if not self.quant.per_token:
            input_scale = read_largest(peer["input_scale"] for peer in linear.peers)
        if self.quant.algorithm is Algorithm.FP8:
            _refuse_nan(linear, codes_NK)
            return Fp8(codes_NK, scale_N, input_scale)
        smoother_K = None
        if self.is_smoothed:
            smoother_K = read_shared_factor(linear, PRE_QUANT_SCALE).reciprocal()
        return Int8(codes_NK, scale_N, input_scale, smoother_K)

    def sketch(self, linear: StoredLinear) -> Int8 | Fp8:
        dtype = CODE_DTYPES[self.quant.algorithm]
        codes_NK, scale_N = meta(linear.outputs, linear.inputs, dtype=dtype), meta(linear.outputs)
        input_scale = None if self.quant.per_token else 1.0
        if self.quant.algorithm is Algorithm.FP8:
            return Fp8(codes_NK, scale_N, input_scale)
        return Int8(
            codes_NK, scale_N, input_scale, meta(linear.inputs) if self.is_smoothed else None
        )


def read_shared_factor(linear: StoredLinear, suffix: str) -> Tensor:
    """The factor of a layer's input as fp32 [K], which its peers must have, too.

    Codes that are rounded already cannot follow another factor without a second rounding.
    """
    sources = [peer[suffix] for peer in linear.peers if suffix in peer]
    factors = [read_scale(source) for source in sources]
    is_shared = all(torch.equal(factor_K, factors[0]) for factor_K in factors)
    if not is_shared or len(sources) != len(linear.peers):
        raise CheckpointError(
            f"{sources[0].origin}: the layers that share the input of {linear.stem} do not share "
            f"its {suffix} ({', '.join(source.name for source in sources)}), so they cannot be "
            "joined; export the model again with a version that makes these scales equal"
        )
    return factors[0]


def _refuse_nan(linear: StoredLinear, codes_NK: Tensor) -> None:
    # float8_e4m3fn has no infinity; all bits but the sign set is its NaN.
    if ((codes_NK.view(torch.uint8) & 0x7F) == 0x7F).any():
        source = linear.tensors["weight"]
        raise CheckpointError(
            f"{source.origin}: tensor {source.name!r} holds NaN; the file is damaged or the "
            "quantisation failed, get a sound copy"
        )
