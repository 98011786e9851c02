"""The single file that GPTQ-for-LLaMa writes: names and packing of GPTQ, no configuration.

https://github.com/qwopqwop200/GPTQ-for-LLaMa
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from engine.checkpoint.base import Checkpoint, TensorSource
from engine.checkpoint.gptq import ZERO_BIAS, Gptq
from engine.checkpoint.hf import NOT_NEEDED, canonical_sources
from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_groups import WHOLE_ROW, plan_groups
from engine.checkpoint.quantised import QuantisedCheckpoint
from engine.checkpoint.quantised_file import find_file, merge_with_base, refuse_quantised_base
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.checkpoint.torch_file import TorchFile
from engine.errors import CheckpointError, UserError

READERS = {
    ".safetensors": SafetensorsFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
    ".bin": TorchFile,
}


def open_gptq_file(path: Path, base: Checkpoint, group_size: int) -> QuantisedCheckpoint:
    """The model of `base` with the linear layers of the file.

    `group_size` is --group_size, -1 for one group per row. Raises UserError where it is not the
    file's, and CheckpointError for what is wrong with the file; the caller then closes `base`.
    """
    refuse_quantised_base(find_file(path), base)
    reader = READERS.get(path.suffix)
    if reader is None or path.is_dir():
        raise CheckpointError(
            f"--quant_ckpt_path {path} is not a file of GPTQ-for-LLaMa (.safetensors or .pt); a "
            "directory with config.json is given as --model_dir alone"
        )
    groups = plan_groups(group_size, base.config, "--group_size")
    with ExitStack() as stack:
        file = stack.enter_context(closing(reader(path)))
        own = canonical_sources(file.tensors)
        _check_group_size(path, own, base, group_size)
        return merge_with_base(
            path,
            base,
            own,
            # Nothing says that the file is symmetric, so its zero points are kept.
            Gptq(groups, ZERO_BIAS["gptq"], sym=False),
            dropped=tuple(name for name in file.tensors if NOT_NEEDED.search(name)),
            resources=stack.pop_all(),
        )


def _check_group_size(
    path: Path, own: Mapping[str, TensorSource], base: Checkpoint, group_size: int
) -> None:
    """Raise UserError if the file's first layer has groups of another size than the flag."""
    stem, (_, inputs) = next(iter(linear_shapes(base.config).items()))
    scales = own.get(f"{stem}.scales")
    if scales is None:
        raise CheckpointError(
            f"--quant_ckpt_path {path} has no tensor {stem}.scales, so it is not a file of "
            "GPTQ-for-LLaMa for this model; check the path, and --model_dir"
        )
    rows = max(1, scales.shape[0] if scales.shape else 1)
    given = inputs if group_size == WHOLE_ROW else group_size
    if inputs // rows != given:
        raise UserError(
            f"--group_size {group_size} differs from the {inputs // rows} inputs per group of "
            f"{path}; give --group_size {inputs // rows}"
        )
