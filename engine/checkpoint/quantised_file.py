"""What the quantised files of --quant_ckpt_path have in common.

Such a file has no configuration, and may lack the tensors in full precision: both come from the
checkpoint of --model_dir, the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from engine.checkpoint.base import EMBEDDING, HEAD, Checkpoint, TensorSource
from engine.checkpoint.linear_layers import is_linear
from engine.checkpoint.quantised import LinearFormat, QuantisedCheckpoint
from engine.errors import CheckpointError


def find_file(path: Path) -> Path:
    """`path` if there is such a file or directory; CheckpointError if not."""
    if not path.exists():
        raise CheckpointError(
            f"--quant_ckpt_path {path} does not exist; give the path of the quantised file"
        )
    return path


def refuse_quantised_base(path: Path, base: Checkpoint) -> None:
    """Raise CheckpointError unless the base can lend its tensors to the file at `path`."""
    if base.quant is not None:
        raise CheckpointError(
            f"--quant_ckpt_path {path} cannot be combined with {base.where}, which is quantised "
            "already; name the full-precision checkpoint the file was made from as --model_dir"
        )


def merge_with_base(
    path: Path,
    base: Checkpoint,
    own: Mapping[str, TensorSource],
    linear_format: LinearFormat,
    *,
    dropped: tuple[str, ...],
    resources: ExitStack,
) -> QuantisedCheckpoint:
    """The file's linear layers with the tensors in full precision that the file or else the base
    has. Closing the result closes both.
    """
    lent = {name: source for name, source in base.tensors.items() if not is_linear(name)}
    if base.config.tie_word_embeddings and (EMBEDDING in own or HEAD in own):
        # One tensor under two names: either both are the file's or both are the base's.
        del lent[EMBEDDING], lent[HEAD]
    resources.callback(base.close)
    return QuantisedCheckpoint(
        str(path),
        base.config,
        {**lent, **own},
        linear_format,
        generation=base.generation,
        dropped=dropped,
        resources=resources,
    )
