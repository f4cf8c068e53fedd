"""Beyond plain GPTQ: descent, and solving again on tighter grids."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.quantize.descent import descend
from jax_gptq.quantize.grid import storable_scales
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.spec import Spec

# GPTQ takes its grids from the largest weight of a group. Each round shrinks the grids that are the
# best so far, solves on them and descends; larger weights are clipped, and GPTQ spreads the error.
_SHRINK = (0.94, 0.97, 1.0)
_SWEEPS = 2


def refine(
    W: Array,
    H: Array,
    order: Array | None,
    solution: Solution,
    solve_again: Callable[[Array, Array], Solution],
    spec: Spec,
) -> tuple[Solution, Array, Array]:
    """For each column the best of what GPTQ, descent and solving on tighter grids have found.

    Args:
      W, H, order, solution, spec: as of `descend`.
      solve_again: scales and zeros [G, N] -> GPTQ's solution on these grids.

    Returns:
      The solution; and losses f32 [N], of the given one and of this one, which is not higher.
    """
    _, before = descend(W, H, order, solution, spec, 0)
    best, loss = _better(solution, before, *descend(W, H, order, solution, spec, 1))
    for shrink in _SHRINK:
        scales = storable_scales(best.scales * shrink, spec.scale_dtype)
        again = solve_again(scales, best.zeros)
        best, loss = _better(best, loss, *descend(W, H, order, again, spec, _SWEEPS))
    return best, before, loss


@jax.jit
def _better(old: Solution, old_loss: Array, new: Solution, new_loss: Array):
    """Column by column, the one of lower loss; a NaN never wins."""
    better = new_loss < old_loss
    kept = (jnp.where(better, n, o) for n, o in zip(new, old))
    return Solution(*kept), jnp.where(better, new_loss, old_loss)
