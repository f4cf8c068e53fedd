"""Plain GPTQ (Frantar et al., arXiv:2210.17323) for all columns of a layer at once.

With H = U^T U and e = w - wq, the loss of a column is |U e|^2, and U is upper triangular: element i
is U[i, i] e[i] + sum over j > i of U[i, j] e[j]. Solved from the last row to the first, each row is
rounded so that its own element is as small as it can be:

    wq[i] = round(w[i] + a[i] / U[i, i]),    a[i] = sum over j > i of U[i, j] e[j]

This is GPTQ, seen as Babai's nearest plane (Chen et al., arXiv:2507.18553). It needs one Cholesky
factor of H where the original formulation takes the factor of the inverse, three times the work.

The sums are taken as products of matrices at three levels: a stage hears of the stages before it, a
span of the spans before it in its stage, a sub-block of those before it in its span.

Rows are therefore held in reverse: the row that is solved first is the last one. Padding rows, if
K is no multiple of the span, come first in memory, are solved last and couple to nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice, dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop

from jax_gptq.quantize.grid import dequantize_codes, group_grid, round_codes
from jax_gptq.quantize.layout import part
from jax_gptq.quantize.product import product
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.spec import Spec, largest_divisor, padded, sub_block

# Rows of a stage, at most: products of this size run at full speed.
_STAGE = 512


@functools.partial(jax.jit, static_argnames="spec")
def solve(W: Array, U: Array, rows: Array, spec: Spec) -> tuple[Solution, Array, Array]:
    """Codes and grids of some columns.

    Args:
      W: f32 [K, N], rows in natural order, dead rows zero.
      U: from `factoring.factor`, f32 [size, size] with size a multiple of `spec.span`.
      rows: int32 [K], as given to `factor`: the row to be solved first is the last of them.

    Returns:
      A `Solution` with rows in the order in which they were solved, and so are groups, unless they
      are static: then they are W's own; |U e|^2 f32 [N]; and |e|^2 f32 [N].
    """
    grids = static_grids(W, spec) if spec.static_groups else None
    return _solve(W, U, rows, rows // spec.group_size, grids, spec)


@functools.partial(jax.jit, static_argnames="spec")
def solve_on_grids(
    W: Array, U: Array, rows: Array, row_group: Array, grids: tuple[Array, Array], spec: Spec
) -> Solution:
    """As `solve`, with scales and zeros f32 [G, N] given; row_group int32 [K] in the order `rows`.

    Groups stay as they are given.
    """
    return _solve(W, U, rows, row_group, grids, spec)[0]


def _solve(W, U, rows, row_group, given, spec):
    count, columns = W.shape
    size = U.shape[0]
    span = spec.span
    stage = span * largest_divisor(size // span, max(1, _STAGE // span))
    stages = size // stage
    groups = -(-count // spec.group_size)
    ordered = jnp.pad(W[rows], ((size - count, 0), (0, 0)))
    row_group = jnp.pad(row_group, (size - count, 0))

    def solve_span(start, stage_start, a, carry):
        errors, codes, scales, zeros, loss = carry
        # Rows of the stage that are not solved have no errors yet.
        a = dynamic_slice_in_dim(a, start - stage_start, span) + product(
            dynamic_slice(U, (start, stage_start), (span, stage)),
            dynamic_slice_in_dim(errors, stage_start, stage),
        )
        own = part(dynamic_slice(U, (start, start), (span, span)))
        w = dynamic_slice_in_dim(ordered, start, span)
        if given:
            group = dynamic_slice_in_dim(row_group, start, span)
            own_scales, own_zeros = scales[group], zeros[group]
        else:
            # What is left to round, if the rows so far have their errors spread over the others.
            updated = w + jax.lax.linalg.triangular_solve(own, part(a), left_side=True)
            own_grids = _grids(updated, spec)
            first = (size - span - start) // spec.group_size
            scales, zeros = (
                dynamic_update_slice_in_dim(x, new[::-1], first, 0)
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

    def solve_stage(i, carry):
        start = size - (i + 1) * stage

        def add(p, a):
            coupling = dynamic_slice(U, (start, p * stage), (stage, stage))
            return a + product(coupling, dynamic_slice_in_dim(carry[0], p * stage, stage))

        a = fori_loop(stages - i, stages, add, jnp.zeros((stage, columns)))
        return fori_loop(
            0,
            stage // span,
            lambda k, carry: solve_span(start + stage - (k + 1) * span, start, a, carry),
            carry,
        )

    # Padding may fill up whole groups of its own: their grids are dropped at the end.
    grids = given or (jnp.ones((size // spec.group_size, columns)),) * 2
    carry = (
        jnp.zeros((size, columns)),
        jnp.zeros((size, columns), jnp.uint8),
        *grids,
        jnp.zeros((columns,)),
    )
    errors, codes, scales, zeros, loss = fori_loop(0, stages, solve_stage, carry)
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
        block = [dynamic_slice_in_dim(x, top, sub) for x in (w, a, scales, zeros)]
        block[1] += product(dynamic_slice_in_dim(factor, top, sub), errors)
        own = dynamic_slice(factor, (top, top), (sub, sub))
        own_errors, own_codes, own_loss = _solve_rows(block, own, bits)
        return (
            dynamic_update_slice_in_dim(errors, own_errors, top, 0),
            dynamic_update_slice_in_dim(codes, own_codes, top, 0),
            loss + own_loss,
        )

    start = (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), jnp.zeros((columns,)))
    return fori_loop(0, rows // sub, solve_sub, start)


def _solve_rows(block, factor, bits):
    """Row by row, from the last to the first; block: w, a, scales, zeros as of `_solve_span`."""
    w, a, scales, zeros = block
    rows = factor.shape[0]
    inverses = 1 / jnp.diagonal(factor)[:, None]

    def solve_row(m, carry):
        a, codes = carry
        i = rows - 1 - m
        own_w, own_a, scale, zero, inverse = (
            dynamic_slice_in_dim(x, i, 1) for x in (w, a, scales, zeros, inverses)
        )
        code = round_codes(own_w + own_a * inverse, scale, zero, bits)
        error = own_w - dequantize_codes(code, scale, zero)
        a += dynamic_slice_in_dim(factor, i, 1, axis=1) * error
        return a, dynamic_update_slice_in_dim(codes, code, i, 0)

    a, codes = fori_loop(0, rows, solve_row, (a, jnp.zeros_like(w)))
    errors = w - dequantize_codes(codes, scales, zeros)
    return errors, codes.astype(jnp.uint8), jnp.sum(a * a, axis=0)
