"""`gptq_matmul`: checks, batching, differentiation and dispatch of the one operation."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_gptq import ffi
from jax_gptq.errors import BackendError, DtypeError, ShapeError
from jax_gptq.reference import reference_matmul
from jax_gptq.stores import PACKED_LAYOUTS, Store, logical_weight
from jax_gptq.stores.dense import DenseStore
from jax_gptq.stores.protocol import PackedStore
from jax_gptq.stores.sharded import Product, ShardedStore
from jax_gptq.weight import GptqWeight

X_DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = (None, "int8")


def gptq_matmul(
    x: Array,
    store: Store,
    backend: str | None = None,
    *,
    bias: Array | None = None,
    activations: str | None = None,
    x_permuted: bool = False,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """x @ W + bias, where W is a quantized weight.

    | backend         | store                | what runs                                           |
    |-----------------|----------------------|-----------------------------------------------------|
    | None            | any                  | the store's kernel on its platform where it is built|
    |                 |                      | and takes x; the jnp reference everywhere else      |
    | "reference"     | any                  | jnp dequantization, f32 arithmetic                  |
    | "cpu"           | layout "cpu"         | the native host kernel                              |
    | "cuda"          | layout "cuda"        | the CUDA kernels                                    |
    | "cuda-emulated" | layout "cuda"        | the CUDA kernels' source on the host (for tests)    |

    None always works. A named backend never falls back: its call is emitted on any host, and XLA
    reports a missing handler. Works under jit, vmap, grad, checkpoint, scan, shard_map and export
    (the last two not with a store of `jax_gptq.sharding`); differentiable in x, bias and the
    weight's scales, in reverse mode (`jax.jvp` raises).

    Args:
      x: float32, bfloat16 or float16 [..., K]; any leading dimensions, zero rows too.
      store: what `prepare` returned, a `GptqWeight`, or one of `jax_gptq.sharding`.
      backend: see the table.
      bias: [N], added in f32 before the one rounding to x's dtype.
      activations: None, or "int8" to permit kernels that round x to int8 (relative error about
        5e-3); a backend without such a kernel computes exactly, unless it was named.
      x_permuted: the columns of x are already in the order of the store's `perm`.
      preferred_element_type: float32: the sums of 16-bit x are not rounded to its dtype; None: they
        are.

    Returns:
      [..., N] in `preferred_element_type` or x's dtype.

    Raises:
      ShapeError, DtypeError: x or bias does not fit the weight.
      BackendError: the named backend cannot run this store or these activations.
    """
    x, bias = _check_operands(x, store, bias, activations, x_permuted)
    out_dtype = _out_dtype(x, preferred_element_type)
    if isinstance(store, ShardedStore):
        return store.matmul(x, bias, _on_one_device(backend, activations), out_dtype)
    _check_backend(x, store, backend, activations)
    operands = _match_varying((x, store, bias))
    lead = x.shape[:-1]
    rows = operands[0].reshape(math.prod(lead), store.in_features)
    y = _apply(backend, activations, x_permuted, out_dtype, rows, *operands[1:])
    return y.reshape(*lead, store.out_features)


@functools.cache
def _on_one_device(backend: str | None, activations: str | None) -> Product:
    """`gptq_matmul` as a sharded store calls it on each device: one object, as jit wants it."""
    return functools.partial(gptq_matmul, backend=backend, activations=activations)


def _out_dtype(x: Array, preferred: DTypeLike | None) -> jnp.dtype:
    dtype = x.dtype if preferred is None else jnp.dtype(preferred)
    if dtype not in (x.dtype, jnp.float32):
        raise DtypeError(
            f"gptq_matmul: preferred_element_type: expected float32 or x's {x.dtype}, found {dtype}"
        )
    return dtype


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _apply(backend, activations, x_permuted, out_dtype, x, store, bias):
    matmul = _differentiable(backend, activations, x_permuted, x.dtype, out_dtype)
    return matmul(x, store, bias)


@functools.cache
def _differentiable(
    backend: str | None,
    activations: str | None,
    x_permuted: bool,
    x_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Callable:
    """custom_vjp(custom_vmap(dispatch)) for one choice of options and dtypes."""
    forward = _batchable(backend, activations, x_permuted, out_dtype)

    @jax.custom_vjp
    def matmul(x, store, bias):
        return forward(x, store, bias)

    def fwd(*primals):
        x, store, bias = jax.tree.map(lambda p: p.value, primals)
        # x is kept only for the gradient of the scales, which frozen weights never ask for; nothing
        # else is an empty array, since JAX holds one structure of residuals for both cases.
        trained = any(p.perturbed for p in jax.tree.leaves(primals[1]))
        kept_x = x if trained else jnp.zeros(0, x.dtype)
        # The differentiable op again, so that a second derivative meets this rule, not the kernel.
        return matmul(x, store, bias), (kept_x, store, bias)

    def bwd(residuals, dy):
        x, store, bias = residuals
        trained = x.ndim == 2
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            dy = jnp.zeros(dy.shape, dy.dtype)
        # Linear in x: where x was not kept, any x gives the same dx.
        like_x = (dy.shape[0], store.in_features)
        at = x.astype(jnp.float32) if trained else jnp.zeros(like_x, jnp.float32)
        at, dy, store = _match_varying((at, dy.astype(jnp.float32), store))
        leaves, tree = jax.tree.flatten(store)
        floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def reference(x, float_leaves):
            weight = jax.tree.unflatten(tree, _merge(floats, float_leaves, leaves))
            return _reference(x, weight, None, x_permuted)

        _, pullback = jax.vjp(reference, at, [v for v, f in zip(leaves, floats) if f])
        dx, dfloats = pullback(dy)
        dstore = None
        if trained:
            dstore = jax.tree.unflatten(tree, _merge(floats, dfloats, [None] * len(leaves)))
        dbias = None if bias is None else dy.sum(0).astype(bias.dtype)
        return dx.astype(x_dtype), dstore, dbias

    matmul.defvjp(fwd, bwd, symbolic_zeros=True)
    return matmul


def _merge(flags: list[bool], chosen: list, others: list) -> list:
    """`chosen` in order where the flag is set, `others` elsewhere."""
    remaining = iter(chosen)
    return [next(remaining) if flag else other for flag, other in zip(flags, others)]


@functools.cache
def _batchable(
    backend: str | None, activations: str | None, x_permuted: bool, out_dtype: jnp.dtype
) -> Callable:
    """The dispatch with a batching rule that never copies a shared weight per batch element."""

    @jax.custom_batching.custom_vmap
    def matmul(x, store, bias):
        return _dispatch(backend, activations, x_permuted, out_dtype, x, store, bias)

    @matmul.def_vmap
    def _(axis_size, in_batched, *operands):
        x, store, bias = operands
        if not any(jax.tree.leaves(in_batched[1:])):
            y = matmul(x.reshape(axis_size * x.shape[1], x.shape[2]), store, bias)
            return y.reshape(axis_size, x.shape[1], y.shape[1]), True
        leaves, tree = jax.tree.flatten(operands)
        batched = jax.tree.leaves(in_batched)

        def one(slices):
            return matmul(*jax.tree.unflatten(tree, _merge(batched, slices, leaves)))

        return jax.lax.map(one, [v for v, b in zip(leaves, batched) if b]), True

    return matmul


def _dispatch(backend, activations, x_permuted, out_dtype, x, store, bias) -> Array:
    """One [M, K] @ [K, N]: the kernel of the store, or the reference."""

    def reference(x, store, bias):
        return _reference(x.astype(out_dtype), store, bias, x_permuted)

    if backend == "reference" or not isinstance(store, PackedStore):
        return reference(x, store, bias)
    if backend is None and activations and store.supports(x.dtype, activations):
        activations = None  # permission to be less accurate is not an order
    kernel = functools.partial(
        type(store).ffi_call,
        backend=backend or store.platform,
        activations=activations,
        x_permuted=x_permuted,
        out_dtype=out_dtype,
    )
    if backend is not None:
        return kernel(store, x, bias)
    if not ffi.has(store.platform) or store.supports(x.dtype, activations):
        return reference(x, store, bias)
    return jax.lax.platform_dependent(
        x,
        store,
        bias,
        default=reference,
        **{store.platform: lambda x, store, bias: kernel(store, x, bias)},
    )


def _reference(x: Array, store: Store, bias: Array | None, x_permuted: bool) -> Array:
    if isinstance(store, DenseStore):
        return store.matmul(x, bias)
    if x_permuted and isinstance(store, PackedStore) and store.perm is not None:
        x = x[:, jnp.argsort(store.perm)]
    return reference_matmul(x, logical_weight(store), bias)


def _check_operands(x, store, bias, activations, x_permuted) -> tuple[Array, Array | None]:
    if not isinstance(store, (GptqWeight, DenseStore, PackedStore, ShardedStore)):
        raise DtypeError(
            f"gptq_matmul: store: expected a GptqWeight or what prepare() returns, found "
            f"{type(store).__name__}"
        )
    x = jnp.asarray(x)
    if x.dtype.name not in X_DTYPES:
        raise DtypeError(
            f"gptq_matmul: x: expected one of {X_DTYPES}, found {x.dtype}; cast x first"
        )
    if x.ndim < 1 or x.shape[-1] != store.in_features:
        raise ShapeError(
            f"gptq_matmul: x: expected [..., {store.in_features}] for a weight "
            f"[{store.in_features}, {store.out_features}], found shape {x.shape}"
        )
    if bias is not None:
        bias = jnp.asarray(bias)
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise DtypeError(f"gptq_matmul: bias: expected a float dtype, found {bias.dtype}")
        if bias.shape != (store.out_features,):
            raise ShapeError(
                f"gptq_matmul: bias: expected shape ({store.out_features},), found {bias.shape}"
            )
    if activations not in ACTIVATIONS:
        raise BackendError(f"activations must be one of {ACTIVATIONS}, found {activations!r}")
    if x_permuted and not isinstance(store, PackedStore):
        raise BackendError(
            f"x_permuted=True needs a store that carries perm, found {type(store).__name__}; "
            f"prepare the weight for a kernel's layout, or pass x in its own order"
        )
    return x, bias


def _check_backend(x: Array, store: Store, backend: str | None, activations: str | None) -> None:
    if backend in (None, "reference"):
        return
    if backend == "metal":
        raise BackendError(
            'backend "metal" is unsupported: jax_gptq has no Metal kernel. Use backend=None with '
            'layout="dense" or "reference" on the CPU of that machine (JAX_PLATFORMS=cpu)'
        )
    layouts = {name: lay for lay, cls in PACKED_LAYOUTS.items() for name in cls.backends}
    if backend not in layouts:
        raise BackendError(
            f'backend must be None, "reference" or one of {sorted(layouts)}, found {backend!r}'
        )
    if not isinstance(store, PackedStore) or backend not in store.backends:
        raise BackendError(
            f'backend "{backend}" computes with layout "{layouts[backend]}", found a '
            f'{type(store).__name__}; call prepare(weight, layout="{layouts[backend]}") once, or '
            f"use backend=None"
        )
    reason = store.supports(x.dtype, activations)
    # Where it was built, this registers its handlers; where not, it may be lowered for elsewhere.
    if not ffi.has(backend.replace("-", "_")):
        here = jax.default_backend()
        if store.backends[backend] == ("cuda" if here == "gpu" else here):
            reason = reason or "its kernels were not built with this installation"
    if reason:
        raise BackendError(f'backend "{backend}": {reason}; use backend=None')


def _match_varying(operands: Any) -> Any:
    """Inside `shard_map`, make every operand vary over the axes that any of them varies over.

    Outside it, nothing varies and nothing changes.
    """
    varying = [jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(operands)]
    axes = frozenset().union(*varying)
    if not axes:
        return operands

    def cast(leaf):
        missing = tuple(sorted(axes - jax.typeof(leaf).mat.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, operands)
