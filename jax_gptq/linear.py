"""`GptqLinear`: a store and an optional bias, callable inside jitted graphs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_gptq.errors import BackendError, DtypeError, ShapeError
from jax_gptq.matmul import ACTIVATIONS, gptq_matmul
from jax_gptq.pytree import register_pytree, static_field
from jax_gptq.stores import Store, prepare
from jax_gptq.weight import GptqWeight


@register_pytree
@dataclasses.dataclass(frozen=True)
class GptqLinear:
    """y = x @ W + bias with a quantized W; an immutable pytree.

    Attributes:
      store: what `prepare` returned: the weight in the layout its backend computes with.
      bias: [N] or None, in the dtype it was stored in.
      activations: None, or "int8" (see `gptq_matmul`).
    """

    store: Store
    bias: Array | None = None
    activations: str | None = static_field(default=None)

    @classmethod
    def from_raw(cls, *args: Any, **kwargs: Any) -> "GptqLinear":
        """Same arguments and errors as `GptqWeight.from_raw`; repacked for where the arrays are."""
        return cls.from_weight(GptqWeight.from_raw(*args, **kwargs))

    @classmethod
    def from_weight(
        cls, weight: GptqWeight, bias: ArrayLike | None = None, *, layout: str | None = None
    ) -> "GptqLinear":
        """Repack `weight` with `prepare(weight, layout)` and add an optional bias [N]."""
        return cls(prepare(weight, layout)).with_bias(bias)

    @classmethod
    def from_store(
        cls,
        store: Store,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: ArrayLike | None = None,
    ) -> "GptqLinear":
        """Wrap a store that is already prepared; the features, where given, are checked."""
        found = (store.in_features, store.out_features)
        expected = (
            found[0] if in_features is None else in_features,
            found[1] if out_features is None else out_features,
        )
        if found != expected:
            raise ShapeError(
                f"store: expected (in_features, out_features) = {expected}, found {found}"
            )
        return cls(store).with_bias(bias)

    def with_bias(self, bias: ArrayLike | None) -> "GptqLinear":
        """The same layer with another bias [N], or None for none."""
        if bias is not None:
            bias = jnp.asarray(bias)
            if not jnp.issubdtype(bias.dtype, jnp.floating):
                raise DtypeError(f"bias: expected a float dtype, found {bias.dtype}")
            if bias.shape != (self.out_features,):
                raise ShapeError(f"bias: expected shape ({self.out_features},), found {bias.shape}")
        return dataclasses.replace(self, bias=bias)

    def with_activations(self, activations: str | None) -> "GptqLinear":
        """The same layer with `activations=None` (exact) or "int8" permitted."""
        if activations not in ACTIVATIONS:
            raise BackendError(f"activations must be one of {ACTIVATIONS}, found {activations!r}")
        return dataclasses.replace(self, activations=activations)

    @property
    def in_features(self) -> int:
        """K."""
        return self.store.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.store.out_features

    def __call__(
        self,
        x: Array,
        *,
        backend: str | None = None,
        x_permuted: bool = False,
        preferred_element_type: DTypeLike | None = None,
    ) -> Array:
        """x [..., K] -> [..., N]; options and errors are those of `gptq_matmul`."""
        return gptq_matmul(
            x,
            self.store,
            backend,
            bias=self.bias,
            activations=self.activations,
            x_permuted=x_permuted,
            preferred_element_type=preferred_element_type,
        )
