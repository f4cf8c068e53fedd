"""Plain GPTQ (Frantar et al., arXiv:2210.17323) for all columns of a layer at once.

With H = L L^T and e = w - wq, the loss of a column is |e^T L|^2, and L is lower triangular: its
element i is L[i, i] e[i] + sum over j > i of e[j] L[j, i]. Solved from the last row to the first,
each row is rounded so that its own element is as small as it can be:

    wq[i] = round(w[i] + a[i] / L[i, i]),    a[i] = sum over j > i of e[j] L[j, i]

This is GPTQ, seen as Babai's nearest plane (Chen et al., arXiv:2507.18553). It needs one Cholesky
factor of H where the original formulation takes the factor of the inverse, three times the work.

Rows are therefore held in reverse: the row that is solved first is the last one. Padding rows, if
K is no multiple of the span, come first in memory, are solved last and couple to nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop

from jax_gptq.quantize.grid import dequantize_codes, group_grid, round_codes
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.spec import Spec, padded, sub_block


@functools.partial(jax.jit, static_argnames="spec")
def solve(W: Array, L: Array, rows: Array, spec: Spec) -> tuple[Solution, Array, Array]:
    """Codes and grids of some columns.

    Args:
      W: f32 [K, N], rows in natural order, dead rows zero.
      L: from `factoring.factor`, f32 [size, size] with size a multiple of `spec.span`.
      rows: int32 [K], as given to `factor`: the row to be solved first is the last of them.

    Returns:
      A `Solution` with rows in the order in which they were solved, and so are groups, unless they
      are static: then they are W's own; |e^T L|^2 f32 [N]; and |e|^2 f32 [N].
    """
    grids = static_grids(W, spec) if spec.static_groups else None
    return _solve(W, L, rows, rows // spec.group_size, grids, spec)


@functools.partial(jax.jit, static_argnames="spec")
def solve_on_grids(
    W: Array, L: Array, rows: Array, row_group: Array, grids: tuple[Array, Array], spec: Spec
) -> Solution:
    """As `solve`, with scales and zeros f32 [G, N] given; row_group int32 [K] in the order `rows`.

    Groups stay as they are given.
    """
    return _solve(W, L, rows, row_group, grids, spec)[0]


def _solve(W, L, rows, row_group, given, spec):
    count, columns = W.shape
    size = L.shape[0]
    span = spec.span
    groups = -(-count // spec.group_size)
    ordered = jnp.pad(W[rows], ((size - count, 0), (0, 0)))
    row_group = jnp.pad(row_group, (size - count, 0))
    # Padding may fill up whole groups of its own: their grids are dropped at the end.
    grids = given or (jnp.ones((size // spec.group_size, columns)),) * 2
    spans = size // span
    # Sliced here, L would be copied into the layout that triangular_solve wants.
    every = jnp.arange(spans)
    own_factors = L.reshape(spans, span, spans, span)[every, :, every]

    def solve_span(i, carry):
        errors, codes, scales, zeros, loss = carry
        start = size - (i + 1) * span

        def add(p, a):
            row = p * span
            coupling = jax.lax.dynamic_slice(L, (row, start), (span, span))
            return a + _product(coupling, dynamic_slice_in_dim(errors, row, span))

        a = fori_loop(spans - i, spans, add, jnp.zeros((span, columns)))
        own = own_factors[spans - 1 - i]
        w = dynamic_slice_in_dim(ordered, start, span)
        if given:
            group = dynamic_slice_in_dim(row_group, start, span)
            own_scales, own_zeros = scales[group], zeros[group]
        else:
            # What is left to round, if the rows so far have their errors spread over the others.
            updated = w + jax.lax.linalg.triangular_solve(
                own, a, left_side=True, lower=True, transpose_a=True
            )
            own_grids = _grids(updated, spec)
            scales, zeros = (
                dynamic_update_slice_in_dim(x, new[::-1], i * new.shape[0], 0)
                for x, new in zip((scales, zeros), own_grids)
            )
            own_scales, own_zeros = (jnp.repeat(x, spec.group_size, axis=0) for x in own_grids)
        own_errors, own_codes, own_loss = _solve_span(w, a, own, own_scales, own_zeros, spec.bits)
        return (
            dynamic_update_slice_in_dim(errors, own_errors, start, 0),
            dynamic_update_slice_in_dim(codes, own_codes, start, 0),
            scales,
            zeros,
            loss + own_loss,
        )

    carry = (
        jnp.zeros((size, columns)),
        jnp.zeros((size, columns), jnp.uint8),
        *grids,
        jnp.zeros((columns,)),
    )
    errors, codes, scales, zeros, loss = fori_loop(0, spans, solve_span, carry)
    solution = Solution(codes[size - count :][::-1], scales[:groups], zeros[:groups])
    return solution, loss, jnp.sum(errors * errors, axis=0)


def static_grids(W: Array, spec: Spec) -> tuple[Array, Array]:
    """Scales and zeros f32 [G, N] of consecutive groups of W [K, N] as it is."""
    size = padded(W.shape[0], spec.group_size)
    return _grids(jnp.pad(W, ((0, size - W.shape[0]), (0, 0))), spec)


@functools.partial(jax.jit, static_argnames="spec")
def nearest(W: Array, spec: Spec) -> Solution:
    """W [K, N] rounded to nearest on its static grids."""
    scales, zeros = static_grids(W, spec)
    row_scales, row_zeros = (
        jnp.repeat(x, spec.group_size, axis=0)[: W.shape[0]] for x in (scales, zeros)
    )
    codes = round_codes(W, row_scales, row_zeros, spec.bits).astype(jnp.uint8)
    return Solution(codes, scales, zeros)


def _grids(w: Array, spec: Spec) -> tuple[Array, Array]:
    """Scales and zeros of consecutive whole groups."""
    grid = functools.partial(
        group_grid,
        bits=spec.bits,
        sym=spec.sym,
        mse=spec.mse,
        scale_dtype=jnp.dtype(spec.scale_dtype),
    )
    return jax.lax.map(grid, w.reshape(-1, spec.group_size, w.shape[1]))


def _solve_span(w, a, factor, scales, zeros, bits):
    """The rows of one span, sub-block by sub-block, from the last row to the first.

    All but `factor` [rows, rows] are f32 [rows, N]. Returns errors, codes and loss [N].
    """
    rows, columns = w.shape
    sub = sub_block(rows)

    def solve_sub(k, carry):
        errors, codes, loss = carry
        top = rows - (k + 1) * sub
        part = [dynamic_slice_in_dim(x, top, sub) for x in (w, a, scales, zeros)]
        part[1] += _product(dynamic_slice_in_dim(factor, top, sub, axis=1), errors)
        own = jax.lax.dynamic_slice(factor, (top, top), (sub, sub))
        own_errors, own_codes, own_loss = _solve_rows(part, own, bits)
        return (
            dynamic_update_slice_in_dim(errors, own_errors, top, 0),
            dynamic_update_slice_in_dim(codes, own_codes, top, 0),
            loss + own_loss,
        )

    start = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros((columns,)))
    return fori_loop(0, rows // sub, solve_sub, start)


def _solve_rows(part, factor, bits):
    """Row by row, from the last to the first; part: w, a, scales, zeros as of `_solve_span`."""
    w, a, scales, zeros = part
    rows, columns = w.shape
    pivots = jnp.diagonal(factor)

    def solve_row(m, carry):
        a, errors, codes, loss = carry
        i = rows - 1 - m
        own_w, own_a, scale, zero = w[i], a[i], scales[i], zeros[i]
        code = round_codes(own_w + own_a / pivots[i], scale, zero, bits)
        error = own_w - dequantize_codes(code, scale, zero)
        a += factor[i][:, None] * error[None, :]
        return (
            a,
            errors.at[i].set(error),
            codes.at[i].set(code.astype(jnp.uint8)),
            loss + a[i] * a[i],
        )

    start = (a, jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros((columns,)))
    return fori_loop(0, rows, solve_row, start)[1:]


def _product(left: Array, right: Array) -> Array:
    """left^T @ right in full f32."""
    return jax.lax.dot_general(
        left, right, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
