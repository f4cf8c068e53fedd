"""Logits against a table of rows: the output head, tied or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gptq import ffi


@jax.custom_vjp
def table_logits(x: Array, table: Array) -> Array:
    """x [..., K] @ table[N, K].T -> f32 [..., N], summed in f32.

    XLA would write a float32 copy of a 16-bit table first, for every token. On a CPU few rows go to
    the native kernel `jax_gptq.cpu.table_logits.v1` where it is built; elsewhere float32 rows are
    split, for a bfloat16 table, into bfloat16 ones: on a GPU several times as fast as a float32
    dot, and as exact as the tensor cores' sums.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = rows.shape[0] <= _native_rows(x.dtype, table.dtype) and ffi.has("cpu")
    split = x.dtype == jnp.float32 and table.dtype == jnp.bfloat16
    y = jax.lax.platform_dependent(
        rows, table, cpu=_native if few else _dot, default=_split_dot if split else _dot
    )
    return y.reshape(*x.shape[:-1], table.shape[0])


def _native_rows(x_dtype: np.dtype, table_dtype: np.dtype) -> int:
    """Up to how many rows the native kernel was faster than XLA's dot (Zen 4, 151936 x 1536)."""
    if table_dtype not in (jnp.bfloat16, jnp.float16):
        return 0
    return 4 if x_dtype == table_dtype == jnp.bfloat16 else 32  # XLA reads bfloat16 as it is


def _native(rows: Array, table: Array) -> Array:
    result = ffi.result_type((rows.shape[0], table.shape[0]), jnp.float32, like=rows)
    call = jax.ffi.ffi_call(ffi.TABLE_LOGITS, result, vmap_method="sequential")
    return call(rows.astype(jnp.float32), table)


_contract = functools.partial(
    jax.lax.dot_general,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
)


def _contract_rows(rows: Array, table: Array) -> Array:
    return _contract(rows, table, (((1,), (1,)), ((), ())))


def _dot(rows: Array, table: Array) -> Array:
    return _contract_rows(rows, table.astype(rows.dtype))


def _split_dot(rows: Array, table: Array) -> Array:
    """As `_dot`: a float32 is the sum of three bfloat16, whose products are exact in float32."""
    parts = []
    rest = rows
    for _ in range(3):
        # Not a pair of casts: XLA may leave those out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(part), rest - part, 0)
    high, middle, low = jnp.split(_contract_rows(jnp.concatenate(parts), table), 3)
    return high + (middle + low)


def _forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return table_logits(x, table), (x, table)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, table = saved
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = _contract(dy, table.astype(jnp.float32), (((1,), (0,)), ((), ())))
    dtable = _contract(dy, rows.astype(jnp.float32), (((0,), (0,)), ((), ())))
    return dx.reshape(x.shape).astype(x.dtype), dtable.astype(table.dtype)


table_logits.defvjp(_forward, _backward)
