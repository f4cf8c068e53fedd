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

    On a CPU few rows and a 16-bit table go to the native kernel `jax_gptq.cpu.table_logits.v1`
    where it is built: XLA would write a float32 copy of the table first, for every token.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= _native_rows(x.dtype, table.dtype) and ffi.has("cpu"):
        y = jax.lax.platform_dependent(rows, table, cpu=_native, default=_dot)
    else:
        y = _dot(rows, table)
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


def _dot(rows: Array, table: Array) -> Array:
    return _contract(rows, table.astype(rows.dtype), (((1,), (1,)), ((), ())))


def _forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return table_logits(x, table), (x, table)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, table = saved
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = _contract(dy, table.astype(jnp.float32), (((1,), (0,)), ((), ())))
    dtable = _contract(dy, rows.astype(jnp.float32), (((0,), (0,)), ((), ())))
    return dx.reshape(x.shape).astype(x.dtype), dtable.astype(table.dtype)


table_logits.defvjp(_forward, _backward)
