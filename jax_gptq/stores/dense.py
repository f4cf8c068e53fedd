"""The `dense` layout: the weight dequantized once to f32."""

import dataclasses
from typing import ClassVar

from jax import Array

from jax_gptq.pytree import register_pytree, static_field
from jax_gptq.reference import dense_matmul, dequantize
from jax_gptq.weight import GptqWeight


@register_pytree
@dataclasses.dataclass(frozen=True)
class DenseStore:
    """W as f32 [K, N]: eight times the bytes of 4-bit codes, and XLA's own dot.

    How a machine without compiled kernels runs fast after one pass. Terminal: it has no inverse,
    no gradient for the scales, and is not written to checkpoints.
    """

    layout: ClassVar[str] = "dense"

    w: Array
    in_features: int = static_field()
    out_features: int = static_field()

    @classmethod
    def pack(cls, weight: GptqWeight) -> "DenseStore":
        """Dequantize `weight` once."""
        return cls(dequantize(weight), weight.in_features, weight.out_features)

    def matmul(self, x: Array, bias: Array | None) -> Array:
        """x [M, K] @ W + bias -> [M, N] in x's dtype."""
        return dense_matmul(x, self.w, bias)
