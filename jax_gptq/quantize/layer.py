"""`gptq`: one layer, from W and H to a `GptqWeight`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice_in_dim, fori_loop
from jax.typing import ArrayLike, DTypeLike

from jax_gptq.errors import BitsError, QuantizationError, ShapeError
from jax_gptq.host import give_back
from jax_gptq.quantize.asymmetric import asymmetric_target
from jax_gptq.quantize.factoring import factor
from jax_gptq.quantize.layout import part
from jax_gptq.quantize.order import act_order, group_aware_order
from jax_gptq.quantize.panels import joined, pack_panel, panel_width
from jax_gptq.quantize.product import product
from jax_gptq.quantize.refine import refine as refine_columns
from jax_gptq.quantize.report import Report
from jax_gptq.quantize.solution import Solution, in_natural_order
from jax_gptq.quantize.solver import nearest, solve, solve_on_grids
from jax_gptq.quantize.spec import Spec, padded
from jax_gptq.reference import dequantize
from jax_gptq.weight import SCALE_DTYPES, GptqWeight

# Columns whose relative loss is measured.
_SAMPLE = 256
# Relative difference of H and its transpose that rounding in other accumulators may leave.
_ASYMMETRY = 1e-3


def gptq(
    W: ArrayLike,
    H: ArrayLike,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = False,
    static_groups: bool = False,
    act_group_aware: bool = False,
    damp: float = 0.01,
    damp_step: float = 0.01,
    mse: float = 0.0,
    block_size: int = 128,
    refine: bool = True,
    cross: ArrayLike | None = None,
    alpha: float = 1.0,
    scale_dtype: DTypeLike = jnp.float16,
    name: str = "",
) -> tuple[GptqWeight, Report]:
    """Quantize one layer so that tr((W - Wq)^T H (W - Wq)) is small (arXiv:2210.17323).

    All columns are solved in parallel, by functions that are compiled once per shape and set of
    options. The scales that the solver works with are the stored ones, so the loss of what is
    returned is the loss in the report. f32 throughout.

    Args:
      W: float [K, N] (in, out: the transpose of a torch Linear's).
      H: float [K, K], (2/n) sum x x^T over calibration rows x (`Hessian`).
      bits: 2 to 8.
      group_size: rows that share a scale; -1 means K.
      sym: all zero points are 2**(bits-1).
      desc_act: solve rows by descending H[k, k]. Groups follow that order, so the weight has a
        `g_idx`, unless `static_groups`.
      static_groups: take every group's scale from W as it is, before any update.
      act_group_aware: solve whole groups by descending importance, and rows within a group
        (arXiv:2505.14638); needs no `g_idx`. Not together with `desc_act`.
      damp: fraction of H's mean diagonal that is added to the diagonal.
      damp_step: added to `damp` where the factorization fails, twice as much every time.
      mse: exponent of the search for the best clipping of each group (2.4 is usual), 0 for none.
      block_size: rows that are solved before the others are updated.
      refine: then lower the loss further, by coordinate descent over codes, scales and zero points
        and by solving again on tighter grids; no column gets worse. False is plain GPTQ.
      cross: float [K, K], (2/n) sum x (x' - x)^T, where x' is what the float model gives the layer:
        quantize towards the float model's outputs (GPTAQ, `asymmetric_target`). The losses in the
        report are then around the shifted weights.
      alpha: how much of that shift is taken.
      scale_dtype: float16 (what GPTQ files hold), bfloat16 or float32.
      name: of the layer, for messages.

    Returns:
      The weight and a `Report`.

    Raises:
      ShapeError: W is not [K, N], or H or cross not [K, K].
      BitsError: bits outside 2 to 8.
      QuantizationError: W, H or cross is not finite, H is asymmetric or has a negative diagonal, H
        cannot be factored even with `damp` raised to 1, or an option is out of range or excludes
        another.
    """
    where = f"{name}: " if name else ""
    W = _checked_weight(W, where)
    H = _checked_hessian(H, W.shape[0], where)
    count, columns = W.shape
    spec = _checked_spec(
        where, count, bits, group_size, sym, mse, block_size, static_groups, scale_dtype
    )
    if desc_act and act_group_aware:
        raise QuantizationError(
            f"{where}desc_act and act_group_aware are two orders: choose one of them"
        )
    if not (0 <= damp < 1 and damp_step > 0):
        raise QuantizationError(
            f"{where}expected 0 <= damp < 1 and damp_step > 0, found {damp} and {damp_step}"
        )
    notes: list[str] = []
    diagonal = jnp.diagonal(H)
    dead = diagonal == 0
    dead_rows = int(jnp.sum(dead))
    if dead_rows == count:
        # Every row would count as dead, and be zero.
        weight = rtn(W, bits=bits, group_size=group_size, sym=sym, mse=mse, scale_dtype=scale_dtype)
        return weight, Report(0.0, 0.0, 0.0, damp, dead_rows, ("H is zero: rounded to nearest",))
    if dead_rows:
        notes.append(f"{dead_rows} of {count} input features are zero in the calibration data")
    order = _order(diagonal, desc_act, act_group_aware, spec.group_size)
    rows = order[::-1]

    U, used_damp, added = factor(H, rows, padded(count, spec.span), damp, damp_step, where)
    give_back()
    if used_damp != damp:
        notes.append(f"H is singular: damp raised from {damp:g} to {used_damp:g}")
    if cross is not None:
        W = asymmetric_target(W, U, rows, _checked_cross(cross, count, where), alpha)

    # Act-order makes groups of its own; all other groups are consecutive rows of W.
    own_groups = desc_act and not spec.static_groups
    fixed_spec = dataclasses.replace(spec, static_groups=True, block_size=spec.span)
    row_group = (jnp.arange(count)[::-1] if own_groups else rows) // spec.group_size

    def grouped(solved: Solution, static: bool) -> Solution:
        return solved if own_groups else in_natural_order(solved, order, spec.group_size, static)

    back = jnp.argsort(order)
    panels = []
    loss = gptq_loss = 0.0
    width = panel_width(columns)
    for start in range(0, columns, width):
        w = _panel(W, dead, start, width)
        solved, damped_loss, squares = solve(w, U, rows, spec)
        solution = grouped(solved, spec.static_groups)
        if refine:
            solution, before, after = refine_columns(
                w[order] if own_groups else w,
                H,
                order if own_groups else None,
                solution,
                lambda *grids, w=w: grouped(
                    solve_on_grids(w, U, rows, row_group, grids, fixed_spec), True
                ),
                spec,
            )
        else:  # |U e|^2 is the loss with a damped H: the damping is taken off again
            before = after = damped_loss - added * squares
        gptq_loss, loss = gptq_loss + float(before.sum()), loss + float(after.sum())
        if own_groups:
            solution = Solution(solution.codes[back], *solution[1:])
        panels.append(pack_panel(solution, spec))
        give_back()

    g_idx = back // spec.group_size if own_groups else None
    weight = joined(panels, g_idx, (count, columns), spec)
    relative = float(_relative_loss(W, H, weight))
    return weight, Report(loss, relative, gptq_loss, used_damp, dead_rows, tuple(notes))


def rtn(
    W: ArrayLike,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    mse: float = 0.0,
    scale_dtype: DTypeLike = jnp.float16,
    name: str = "",
) -> GptqWeight:
    """Round W [K, N] to nearest, without calibration data; arguments and errors as of `gptq`."""
    where = f"{name}: " if name else ""
    W = _checked_weight(W, where)
    spec = _checked_spec(where, W.shape[0], bits, group_size, sym, mse, 1, True, scale_dtype)
    return joined([pack_panel(nearest(W, spec), spec)], None, W.shape, spec)


def _order(diagonal: Array, desc_act: bool, act_group_aware: bool, group_size: int) -> Array:
    """Rows in the order in which they are solved, int32 [K]."""
    if desc_act:
        return act_order(diagonal)
    if act_group_aware:
        return group_aware_order(diagonal, group_size)
    return jnp.arange(diagonal.shape[0], dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="width")
def _panel(W: Array, dead: Array, start: int, width: int) -> Array:
    """Columns of W, zero where there are none and in dead rows: f32 [K, width]."""
    columns = start + jnp.arange(width)
    panel = jnp.take(W, columns, axis=1, mode="fill", fill_value=0)
    return jnp.where(dead[:, None], 0.0, panel)


@jax.jit
def _relative_loss(W: Array, H: Array, weight: GptqWeight) -> Array:
    """tr(E^T H E) / tr(W^T H W) on some columns of what will be stored."""
    columns = jnp.linspace(0, W.shape[1] - 1, min(W.shape[1], _SAMPLE)).astype(jnp.int32)
    some = dataclasses.replace(
        weight,
        qweight=weight.qweight[:, columns],
        scales=weight.scales[:, columns],
        qzeros=weight.qzeros[:, columns],
        out_features=columns.shape[0],
    )
    w = W[:, columns]

    def power(x):
        return jnp.sum(x * product(H, x))

    whole = power(w)
    return jnp.where(whole > 0, power(w - dequantize(some)) / whole, 0.0)


def _checked_weight(W: ArrayLike, where: str) -> Array:
    W = jnp.asarray(W, jnp.float32)
    if W.ndim != 2 or 0 in W.shape:
        raise ShapeError(f"{where}W: expected [in_features, out_features], found shape {W.shape}")
    bad = int(_non_finite(W))
    if bad:
        raise QuantizationError(f"{where}W: expected finite weights, found {bad} that are not")
    return W


def _checked_hessian(H: ArrayLike, count: int, where: str) -> Array:
    H = jnp.asarray(H, jnp.float32)
    if H.shape != (count, count):
        raise ShapeError(
            f"{where}H: expected shape ({count}, {count}) for W with {count} rows "
            f"(in_features first), found {H.shape}"
        )
    bad, asymmetry, largest, smallest = map(float, _hessian_facts(H))
    if bad:
        raise QuantizationError(
            f"{where}H: expected finite values, found {bad:.0f} that are not: the calibration "
            f"activations overflow; run the model in float32 or bfloat16"
        )
    if smallest < 0:
        raise QuantizationError(
            f"{where}H: expected a positive semidefinite matrix, found {smallest:g} on its diagonal"
        )
    if asymmetry > _ASYMMETRY * largest:
        raise QuantizationError(
            f"{where}H: expected a symmetric matrix, found |H - H^T| up to {asymmetry:g} where the "
            f"diagonal is at most {largest:g}"
        )
    return H


@jax.jit
def _non_finite(x: Array) -> Array:
    """How many elements are not; row by row, as all at once would hold another x of integers."""
    return jnp.sum(jax.lax.map(lambda row: jnp.sum(~jnp.isfinite(row)), x, batch_size=64))


@jax.jit
def _hessian_facts(H: Array) -> tuple[Array, Array, Array, Array]:
    """Non-finite elements, largest |H - H^T|, largest and smallest element of the diagonal."""
    diagonal = jnp.diagonal(H)
    size = H.shape[0]
    rows = min(size, 64)  # at a time: H - H.T would be another two of H

    def compare(i, largest):
        own = dynamic_slice_in_dim(H, i * rows, rows)
        columns = part(dynamic_slice_in_dim(H, i * rows, rows, axis=1))
        return jnp.maximum(largest, jnp.max(jnp.abs(own - columns.T)))

    return (
        _non_finite(H),
        fori_loop(0, -(-size // rows), compare, jnp.zeros(())),
        jnp.max(diagonal),
        jnp.min(diagonal),
    )


def _checked_cross(cross: ArrayLike, count: int, where: str) -> Array:
    cross = jnp.asarray(cross, jnp.float32)
    if cross.shape != (count, count):
        raise ShapeError(
            f"{where}cross: expected the shape of H, ({count}, {count}), found {cross.shape}"
        )
    if int(_non_finite(cross)):
        raise QuantizationError(f"{where}cross: expected finite values")
    return cross


def _checked_spec(
    where: str,
    count: int,
    bits: int,
    group_size: int,
    sym: bool,
    mse: float,
    block_size: int,
    static_groups: bool,
    scale_dtype: DTypeLike,
) -> Spec:
    if bits not in range(2, 9):
        raise BitsError(f"{where}bits: expected 2 to 8, found {bits!r}")
    if group_size != -1 and group_size < 1:
        raise ShapeError(f"{where}group_size: expected -1 or at least 1, found {group_size}")
    if block_size < 1:
        raise QuantizationError(f"{where}block_size: expected at least 1, found {block_size}")
    if not (mse == 0 or 1 <= mse <= 8):
        raise QuantizationError(f"{where}mse: expected 0 or an exponent from 1 to 8, found {mse}")
    name = jnp.dtype(scale_dtype).name
    if name not in SCALE_DTYPES:
        raise QuantizationError(f"{where}scale_dtype: expected one of {SCALE_DTYPES}, found {name}")
    # One group for all rows is a static one: nothing is updated before its grid is chosen.
    one_group = group_size == -1 or group_size >= count
    return Spec(
        bits=bits,
        group_size=count if one_group else group_size,
        sym=sym,
        mse=float(mse),
        scale_dtype=name,
        block_size=min(block_size, count),
        static_groups=static_groups or one_group,
    )
