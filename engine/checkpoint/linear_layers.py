"""Which linear layers a network's blocks have, and which of them read the same activation."""

from __future__ import annotations

from engine.checkpoint.base import canonical_shapes
from engine.config import ModelConfig

# The engine joins the layers of such a set into one.
SHARED_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Stem (canonical name without '.weight') -> (outputs, inputs), in the order of the network."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in canonical_shapes(config).items()
        if is_linear(name)
    }


def is_linear(name: str) -> bool:
    """Whether a canonical tensor name is a linear layer's of a block."""
    return name.endswith("_proj.weight")


def find_peers(stem: str) -> tuple[str, ...]:
    """The stems that read the same activation as `stem`, itself included, as they are joined."""
    for names in SHARED_INPUT:
        for name in names:
            if stem.endswith(name):
                return tuple(stem.removesuffix(name) + peer for peer in names)
    return (stem,)
