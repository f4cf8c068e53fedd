"""The only importer of the compiled modules; registers their FFI targets once.

A module that was not built is absent, and `has` says so. A module that is there but cannot be
imported is a broken build, and the import error is shown, not swallowed.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# Compiled module -> the platform its handlers are registered for.
_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA", "cuda_emulated": "cpu"}
# The one target that belongs to no store: an output head's logits (models/table.py).
TABLE_LOGITS = "jax_gptq.cpu.table_logits.v1"


def has(module: str) -> bool:
    """Whether `jax_gptq._<module>` was built; if so, its targets are registered from now on."""
    return load(module) is not None


@functools.cache
def load(module: str) -> ModuleType | None:
    """Import `jax_gptq._<module>` and register its targets; None where it was not built.

    Raises:
      ImportError: the module is there but cannot be loaded.
    """
    name = f"jax_gptq._{module}"
    if importlib.util.find_spec(name) is None:
        return None
    compiled = importlib.import_module(name)
    for target, handler in compiled.targets().items():
        jax.ffi.register_ffi_target(target, handler, platform=_PLATFORMS[module])
    return compiled


def result_type(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> jax.ShapeDtypeStruct:
    """Type of an FFI call's result that varies over the same `shard_map` axes as operand `like`.

    JAX is asked for the type of an expression in `like`: there is no public constructor for it.
    """
    return jax.eval_shape(lambda x: jnp.zeros(shape, dtype) + x.sum().astype(dtype), like)
