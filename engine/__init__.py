"""The engine: what reads checkpoints, writes engine directories and runs them."""
