"""Codes and grids of some columns, before they are packed."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Solution(NamedTuple):
    """uint8 codes [K, N]; f32 scales and zeros [G, N]. Rows and groups in an order of the solver's
    or of the weight's."""

    codes: Array
    scales: Array
    zeros: Array


def in_natural_order(solved: Solution, order: Array, group_size: int, static: bool) -> Solution:
    """Rows and groups of the weight, from rows solved in `order`.

    Args:
      order: int32 [K], the row that was solved first, second, ... Each group's rows are consecutive
        in it, unless groups are static.
      static: the groups of `solved` are the weight's already.
    """
    codes = jnp.zeros_like(solved.codes).at[order].set(solved.codes)
    if static:
        return Solution(codes, solved.scales, solved.zeros)
    groups = order[::group_size] // group_size
    scales, zeros = (jnp.zeros_like(x).at[groups].set(x) for x in solved[1:])
    return Solution(codes, scales, zeros)
