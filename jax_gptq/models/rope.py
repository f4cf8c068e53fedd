"""Rotary position embedding and its scalings to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gptq.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Angles of one kind of layer: position p turns pair i by p * frequencies[i].

    Attributes:
      frequencies: [head_dim / 2], the scaling already applied.
      attention_factor: multiplies cos and sin (YaRN; 1 elsewhere).
      max_positions: beyond it the angles would be others (dynamic NTK), or None.
    """

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    max_positions: int | None = None

    @classmethod
    def from_hf(
        cls, values: Mapping[str, Any], head_dim: int, theta: float, max_positions: int
    ) -> "RopeConfig":
        """From the words of config.json: rope_type (or type), rope_theta, factor and the rest.

        Sources: linear, Chen et al., arXiv:2306.15595; llama3, the Llama 3.1 reference code; yarn,
        Peng et al., arXiv:2309.00071; dynamic equals default up to `max_positions`.

        Raises:
          ModelError: an unknown type, or a parameter that its type needs is missing.
        """
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"config.json: rope_type: expected one of {ROPE_TYPES}, found {kind!r}"
            )
        theta = values.get("rope_theta", theta)
        base = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        attention, limit = 1.0, None
        try:
            if kind == "linear":
                base = base / values["factor"]
            elif kind == "dynamic":
                limit = max_positions
            elif kind == "llama3":
                base = _llama3(base, values)
            elif kind == "yarn":
                base, attention = _yarn(base, values, head_dim, theta, max_positions)
        except KeyError as error:
            raise ModelError(
                f"config.json: rope_type {kind!r} needs {error.args[0]!r}, found no such key"
            ) from error
        return cls(tuple(base.tolist()), attention, limit)


def _llama3(base: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
    """Long waves slowed down by `factor`, short ones kept, a linear blend between."""
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    turns = values["original_max_position_embeddings"] * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * base + (1 - kept) * base / values["factor"]


def _yarn(
    base: np.ndarray, values: Mapping[str, Any], head_dim: int, theta: float, max_positions: int
) -> tuple[np.ndarray, float]:
    """Interpolation of the pairs that turn seldom, by a ramp; and the factor on cos and sin."""
    factor = values["factor"]
    original = values.get("original_max_position_embeddings") or max_positions

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(values.get("beta_fast") or 32)
    high = pair_that_turns(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    interpolated = np.clip((np.arange(len(base)) - low) / (high - low), 0, 1)
    attention = values.get("attention_factor")
    if attention is None:
        mscale, all_dim = values.get("mscale"), values.get("mscale_all_dim")
        attention = _mscale(factor)
        if mscale and all_dim:
            attention = _mscale(factor, mscale) / _mscale(factor, all_dim)
    return base * (1 - interpolated) + base / factor * interpolated, attention


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(rope: RopeConfig, positions: Array) -> tuple[Array, Array]:
    """positions int [B, T] -> cos, sin f32 [B, T, 1, head_dim / 2]."""
    frequencies = np.asarray(rope.frequencies, np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: Array, tables: tuple[Array, Array]) -> Array:
    """Turn the pairs (i, i + head_dim / 2) of x [B, T, heads, head_dim], in f32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
