"""Checkpoint files: one reader per format, one writer, one normal form behind them."""

from jax_gptq.checkpoint.reader import Checkpoint, load_linears, load_weights, open_checkpoint
from jax_gptq.checkpoint.writer import save_weights

__all__ = ["Checkpoint", "load_linears", "load_weights", "open_checkpoint", "save_weights"]
