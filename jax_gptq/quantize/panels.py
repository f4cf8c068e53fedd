"""Columns do not depend on each other: panels of them bound the memory beside W and H."""

from collections.abc import Iterable, Sequence

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


def packed(
    solutions: Sequence[Solution], g_idx: Array | None, columns: int, spec: Spec
) -> GptqWeight:
    """Panels, rows in natural order, as one weight of so many columns."""

    def joined(parts: Iterable[Array]) -> Array:
        return jnp.concatenate(list(parts), axis=1)[:, :columns]

    return GptqWeight(
        joined(_pack(each.codes, spec.bits) for each in solutions),
        joined(each.scales.astype(spec.scale_dtype) for each in solutions),
        joined(each.zeros.astype(jnp.uint8) for each in solutions),
        g_idx,
        spec.bits,
        spec.group_size,
        solutions[0].codes.shape[0],
        columns,
    )


_pack = jax.jit(pack_codes, static_argnames="bits")
