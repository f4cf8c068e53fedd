"""What `matmul.py` asks of a packed store; one class per layout implements it."""

from typing import ClassVar, Protocol, runtime_checkable

from jax import Array
from jax.typing import DTypeLike

from jax_gptq.weight import GptqWeight


@runtime_checkable
class PackedStore(Protocol):
    """A bijection of a `GptqWeight` in the layout that one platform's kernel prefers.

    A frozen dataclass registered as a pytree: arrays are leaves, integers are static.

    Attributes:
      platform: the key of `jax.lax.platform_dependent` under which the kernel runs.
      backends: backend name -> platform its FFI call is lowered for.
      targets: every FFI target that `ffi_call` can emit; the names are a contract.
    """

    platform: ClassVar[str]
    backends: ClassVar[dict[str, str]]
    targets: ClassVar[tuple[str, ...]]

    @property
    def perm(self) -> Array | None:
        """int32 [K], the row of W at each of the store's rows; None: in W's order."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def out_features(self) -> int:
        """N."""

    @staticmethod
    def unsupported(weight: GptqWeight) -> str | None:
        """Why this layout cannot hold `weight`, in words; None if it can."""

    @classmethod
    def pack(cls, weight: GptqWeight) -> "PackedStore":
        """Repack `weight`. Raises LayoutError where `unsupported` gives a reason."""

    def unpack(self) -> GptqWeight:
        """The exact inverse of `pack`, in jnp: it can be traced."""

    def supports(self, x_dtype: DTypeLike, activations: str | None) -> str | None:
        """Why the kernel cannot take activations of this dtype or mode; None if it can."""

    def ffi_call(
        self,
        x: Array,
        bias: Array | None,
        *,
        backend: str,
        activations: str | None,
        x_permuted: bool,
        out_dtype: DTypeLike,
    ) -> Array:
        """The kernel on x [M, K] -> [M, N] in x's dtype or f32: `jax.ffi.ffi_call`, little else."""
