"""Groups of inputs that share a scale: those of a file and those of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.checkpoint.linear_layers import linear_shapes
from engine.checkpoint.quant_settings import Settings
from engine.config import ModelConfig
from engine.errors import CheckpointError

# What the kernels take, in the order of preference. A longer group is stored as several of these
# with the same scale.
GROUP_SIZES = (128, 64, 32)
WHOLE_ROW = -1


@dataclass(frozen=True)
class Groups:
    """Inputs that share a scale: `file` of them in the file (-1: all), `engine` in the engine.

    `engine` divides `file`.
    """

    file: int
    engine: int

    def count(self, inputs: int) -> int:
        """Groups of a row of `inputs` in the file."""
        return 1 if self.file == WHOLE_ROW else inputs // self.file

    def spread(self, values_NR: Tensor, inputs: int) -> Tensor:
        """Values per group of the file, repeated to be per group of the engine: [N, R]."""
        times = inputs // self.engine // values_NR.shape[1]
        return values_NR.repeat_interleave(times, dim=1) if times > 1 else values_NR.contiguous()


def read_groups(
    settings: Settings, config: ModelConfig, default: int | None = None, key: str = "group_size"
) -> Groups:
    """The groups that the settings describe, for all linear layers."""
    group_size = settings.get(key, default)
    if type(group_size) is not int:
        raise settings.refusal(key, "a whole number", "correct the file")
    return plan_groups(group_size, config, f"{settings.file}: {settings.prefix}{key}")


def plan_groups(group_size: int, config: ModelConfig, where: str) -> Groups:
    """The groups of a file; `where` names the setting in messages.

    Raises CheckpointError for a group size that does not divide the inputs of every linear layer,
    or that is not a multiple of one the engine has.
    """
    widths = sorted({inputs for _, inputs in linear_shapes(config).values()})
    lengths: Sequence[int] = widths if group_size == WHOLE_ROW else [group_size]
    if min(lengths) < 1:
        raise CheckpointError(f"{where} {group_size} must be above zero, or -1 for whole rows")
    for width in widths:
        if group_size != WHOLE_ROW and width % group_size:
            raise CheckpointError(
                f"{where} {group_size} does not divide the {width} inputs of a linear layer; use "
                "a checkpoint with another group size"
            )
    for engine in GROUP_SIZES:
        if all(length % engine == 0 for length in lengths):
            return Groups(group_size, engine)
    sizes = " or ".join(str(size) for size in sorted(GROUP_SIZES))
    raise CheckpointError(
        f"{where} {group_size} is not supported: a group must be a multiple of "
        f"{min(GROUP_SIZES)} inputs long; use a checkpoint with group size {sizes}"
    )


def require_multiples(
    config: ModelConfig, where: str, *, of_outputs: int = 1, of_inputs: int = 1
) -> None:
    """CheckpointError unless the sizes of all linear layers can be packed without a remainder."""
    for stem, (outputs, inputs) in linear_shapes(config).items():
        if outputs % of_outputs or inputs % of_inputs:
            raise CheckpointError(
                f"{where}: {stem} with {outputs} outputs and {inputs} inputs cannot be packed by "
                f"{of_outputs} outputs and {of_inputs} inputs, as this format does; use the "
                "config file that came with the weights"
            )
