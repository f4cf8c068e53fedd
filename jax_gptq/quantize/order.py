"""In which order the rows of a layer are solved."""

import jax.numpy as jnp
from jax import Array


def act_order(diagonal: Array) -> Array:
    """Rows by descending H[k, k] (`desc_act`): int32 [K]."""
    return jnp.argsort(-diagonal, stable=True).astype(jnp.int32)


def group_aware_order(diagonal: Array, group_size: int) -> Array:
    """Whole groups by their largest H[k, k], rows within a group by descending H[k, k]: int32 [K].

    Groups keep their rows, so no `g_idx` is needed (Gafni et al., arXiv:2505.14638). A partial last
    group stays last and keeps its order.
    """
    count = diagonal.shape[0]
    groups = count // group_size
    whole = diagonal[: groups * group_size].reshape(groups, group_size)
    within = jnp.argsort(-whole, axis=1, stable=True)
    rows = within + jnp.arange(groups)[:, None] * group_size
    rows = rows[jnp.argsort(-whole.max(axis=1), stable=True)].reshape(-1)
    return jnp.concatenate([rows, jnp.arange(groups * group_size, count)]).astype(jnp.int32)
