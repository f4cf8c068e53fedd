"""Coordinate descent on the loss of a solved layer: codes, scales and zero points, one by one.

The loss of a column is e^T H e with e = w - s (q - z), and G = H e its gradient (halved). With all
else fixed, the best integer step of code k is G[k] / (s H[k, k]), rounded and clipped; the best
step of the scale of a group, whose centred codes are c = q - z, is c^T G / c^T H c; the best step
of its zero point is - 1^T G / (s 1^T H 1), rounded. Each step is taken where it lowers the loss.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop

from jax_gptq.quantize.grid import dequantize_codes, storable_scales
from jax_gptq.quantize.product import product
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.spec import Spec, largest_divisor, padded, sub_block


@functools.partial(jax.jit, static_argnames=("spec", "sweeps"))
def descend(
    W: Array, H: Array, order: Array | None, solution: Solution, spec: Spec, sweeps: int
) -> tuple[Solution, Array]:
    """Lower e^T H e of every column.

    Args:
      W: f32 [K, N], in an order in which the groups are consecutive.
      H: f32 [K, K], symmetric, not damped, in natural order.
      order: int32 [K], the rows of H in the order of W; None: that of H. Rows are gathered as they
        are needed, so that H is held once.
      solution: in that order.
      spec: of the solve; `static_groups` is not looked at.
      sweeps: passes over all rows; 0 only measures.

    Returns:
      The solution, lower but for rounding errors in the sums, and its measured loss f32 [N].
    """
    codes, scales, zeros = solution
    count = W.shape[0]
    groups = scales.shape[0]
    span = _span(spec, groups)
    unit = min(span, spec.group_size)
    size = padded(padded(count, spec.group_size), span)
    pad = size - count
    all_groups = -(-size // spec.group_size)
    # H knows nothing of padding rows, so that their errors, whatever they are, count for nothing.
    H = jnp.pad(H, ((0, pad), (0, pad)))
    if order is not None:
        order = jnp.concatenate([order, jnp.arange(count, size)])
    rows_of = functools.partial(_rows_of, H, order)
    codes = jnp.pad(codes, ((0, pad), (0, 0)))
    scales = jnp.pad(scales, ((0, all_groups - groups), (0, 0)), constant_values=1)
    zeros = jnp.pad(zeros, ((0, all_groups - groups), (0, 0)))
    row_scales, row_zeros = (jnp.repeat(x, spec.group_size, 0)[:size] for x in (scales, zeros))
    errors = jnp.pad(W, ((0, pad), (0, 0))) - dequantize_codes(codes, row_scales, row_zeros)

    def sweep(_, state):
        step = functools.partial(_span_step, rows_of, spec, span, unit)
        state = fori_loop(0, size // span, step, state)
        if spec.group_size > span:  # a group of several spans: its grid is refitted as a whole
            state = fori_loop(0, groups, functools.partial(_group_step, rows_of, spec), state)
        return state

    errors, codes, scales, zeros = fori_loop(0, sweeps, sweep, (errors, codes, scales, zeros))
    return Solution(codes[:count], scales[:groups], zeros[:groups]), _loss(rows_of, errors)


def _rows_of(H: Array, order: Array | None, start: Array | int, rows: int) -> Array:
    if order is None:
        return dynamic_slice_in_dim(H, start, rows)
    return H[dynamic_slice_in_dim(order, start, rows)][:, order]


def _span(spec: Spec, groups: int) -> int:
    """Rows of one outer step: whole groups, or a part of a large one."""
    block, size = spec.block_size, spec.group_size
    if size <= 2 * block:
        return size * max(1, block // size)
    if groups == 1:
        return block
    divisor = max(d for d in range(1, block + 1) if size % d == 0)
    return divisor if divisor >= 16 else size


def _span_step(rows_of, spec, span, unit, i, state):
    errors, codes, scales, zeros = state
    start = i * span
    coupling = rows_of(start, span)
    gradient = product(coupling, errors)
    coupling = dynamic_slice_in_dim(coupling, start, span, axis=1)
    whole_groups = spec.group_size <= span
    columns = errors.shape[1]

    def unit_step(j, state):
        changes, codes, scales, zeros = state
        top = j * unit
        group = (start + top) // spec.group_size
        own = jax.lax.dynamic_slice(coupling, (top, top), (unit, unit))
        own_codes = dynamic_slice_in_dim(codes, start + top, unit)
        scale, zero = scales[group], zeros[group]
        own_gradient = dynamic_slice_in_dim(gradient, top, unit)
        if unit < span:  # what the units before have changed
            own_gradient += product(dynamic_slice_in_dim(coupling, top, unit), changes)
        own_changes, own_codes = _unit_codes(own, own_gradient, own_codes, scale, spec.bits)
        codes = dynamic_update_slice_in_dim(codes, own_codes, start + top, 0)
        if whole_groups:
            own_gradient += product(own, own_changes)
            grid, change = _regrid(own, own_gradient, own_codes, scale, zero, spec)
            scales, zeros = (x.at[group].set(v) for x, v in zip((scales, zeros), grid))
            own_changes += change
        return dynamic_update_slice_in_dim(changes, own_changes, top, 0), codes, scales, zeros

    changes, codes, scales, zeros = fori_loop(
        0, span // unit, unit_step, (jnp.zeros((span, columns)), codes, scales, zeros)
    )
    own_errors = dynamic_slice_in_dim(errors, start, span) + changes
    return dynamic_update_slice_in_dim(errors, own_errors, start, 0), codes, scales, zeros


def _group_step(rows_of, spec, group, state):
    """Refit the grid of one large group."""
    errors, codes, scales, zeros = state
    size = spec.group_size
    start = group * size
    rows = rows_of(start, size)
    own_codes = dynamic_slice_in_dim(codes, start, size)
    grid, change = _regrid(
        dynamic_slice_in_dim(rows, start, size, axis=1),
        product(rows, errors),
        own_codes,
        scales[group],
        zeros[group],
        spec,
    )
    own_errors = dynamic_slice_in_dim(errors, start, size) + change
    errors = dynamic_update_slice_in_dim(errors, own_errors, start, 0)
    return errors, codes, *(x.at[group].set(v) for x, v in zip((scales, zeros), grid))


def _unit_codes(own, gradient, codes, scale, bits):
    """One pass over the codes of a unit; returns the changes of the errors, and the codes.

    own [rows, rows]; gradient, codes [rows, N]; scale [N].
    """
    rows = codes.shape[0]
    sub = sub_block(rows)

    def sub_step(k, carry):
        changes, codes = carry
        top = k * sub
        coupling = dynamic_slice_in_dim(own, top, sub)
        sub_gradient = dynamic_slice_in_dim(gradient, top, sub) + product(coupling, changes)
        sub_coupling = dynamic_slice_in_dim(coupling, top, sub, axis=1)
        curvature = jnp.diagonal(sub_coupling)
        # A dead row has no curvature, and no gradient either: its code stays.
        inverse = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)

        def row_step(r, carry):
            sub_gradient, sub_changes, sub_codes = carry
            old = sub_codes[r].astype(jnp.float32)
            new = jnp.clip(jnp.round(old + sub_gradient[r] * inverse[r] / scale), 0, 2**bits - 1)
            change = -scale * (new - old)
            sub_gradient += sub_coupling[:, r][:, None] * change[None, :]
            return (
                sub_gradient,
                sub_changes.at[r].set(change),
                sub_codes.at[r].set(new.astype(jnp.uint8)),
            )

        sub_codes = dynamic_slice_in_dim(codes, top, sub)
        sub_start = (sub_gradient, jnp.zeros_like(sub_gradient), sub_codes)
        _, sub_changes, sub_codes = fori_loop(0, sub, row_step, sub_start)
        return (
            dynamic_update_slice_in_dim(changes, sub_changes, top, 0),
            dynamic_update_slice_in_dim(codes, sub_codes, top, 0),
        )

    return fori_loop(0, rows // sub, sub_step, (jnp.zeros_like(gradient), codes))


def _regrid(own, gradient, codes, scale, zero, spec):
    """Best scale, then best zero point, of one group.

    own [rows, rows]; gradient, codes [rows, N]; scale, zero [N].

    Returns:
      (scale, zero) and the change of the errors [rows, N].
    """
    centred = codes - zero
    curved = product(own, centred)
    slope = jnp.sum(centred * gradient, axis=0)
    curvature = jnp.sum(centred * curved, axis=0)
    best = scale + slope / jnp.where(curvature > 0, curvature, 1)
    step = storable_scales(best, spec.scale_dtype) - scale
    # The rounded step may overshoot: the change of the loss decides.
    step = jnp.where((curvature > 0) & (step * (step * curvature - 2 * slope) < 0), step, 0)
    scale = scale + step
    change = -step * centred
    if spec.sym:
        return (scale, zero), change
    gradient = gradient - step * curved
    slope = jnp.sum(gradient, axis=0)
    curvature = jnp.sum(own)
    shift = jnp.round(-slope / (scale * jnp.where(curvature > 0, curvature, 1)))
    moved = jnp.clip(zero + shift, 0, 2**spec.bits - 1) - zero
    gain = scale * moved * (2 * slope + scale * moved * curvature)
    moved = jnp.where((curvature > 0) & (gain < 0), moved, 0)
    return (scale, zero + moved), change + (scale * moved)[None, :]


def _loss(rows_of, errors: Array) -> Array:
    """e^T H e per column, in blocks of rows, so that H e is never held whole."""
    size = errors.shape[0]
    rows = largest_divisor(size, 512)

    def add(i, loss):
        own = dynamic_slice_in_dim(errors, i * rows, rows)
        return loss + jnp.sum(own * product(rows_of(i * rows, rows), errors), axis=0)

    return fori_loop(0, size // rows, add, jnp.zeros((errors.shape[1],)))
