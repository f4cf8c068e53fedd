"""Columns do not depend on each other: panels of them bound the memory beside W and H."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.packing import pack_codes
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.spec import Spec
from jax_gptq.weight import GptqWeight

# A panel is at most a sixteenth of the columns, unless that is narrow: refinement holds a dozen.
_NARROW, _WIDEST = 256, 1024


def panel_width(columns: int) -> int:
    """Columns of each panel, so that all are alike and compile once; the last may be padded."""
    widest = min(max(columns // 16, _NARROW), _WIDEST)
    return -(-columns // -(-columns // widest))


def pack_panel(solution: Solution, spec: Spec) -> tuple[Array, Array, Array]:
    """A panel, rows in natural order, as a weight holds it: a fraction of its codes in bytes."""
    codes, scales, zeros = solution
    return _pack(codes, spec.bits), scales.astype(spec.scale_dtype), zeros.astype(jnp.uint8)


def joined(
    panels: Sequence[tuple[Array, Array, Array]],
    g_idx: Array | None,
    shape: tuple[int, ...],
    spec: Spec,
) -> GptqWeight:
    """Packed panels as one weight of that shape [K, N]."""
    qweight, scales, zeros = (
        jnp.concatenate(parts, axis=1)[:, : shape[1]] for parts in zip(*panels)
    )
    return GptqWeight(qweight, scales, zeros, g_idx, spec.bits, spec.group_size, shape[0], shape[1])


_pack = jax.jit(pack_codes, static_argnames="bits")
