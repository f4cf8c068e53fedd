"""`GptqWeight`: one quantized matrix in normal form, whatever file it came from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_gptq.errors import (
    BitsError,
    CheckpointFormatError,
    DtypeError,
    GroupIndexError,
    ScalesError,
    ShapeError,
    ZeroPointError,
)
from jax_gptq.packing import packed_rows, unpack_codes, unpack_codes_on_host
from jax_gptq.pytree import register_pytree, static_field

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
ZERO_ADD_RULES = ("field", "word")
SCALE_DTYPES = ("float16", "bfloat16", "float32")


@register_pytree
@dataclasses.dataclass(frozen=True)
class GptqWeight:
    """A GPTQ-quantized weight matrix W [K=in_features, N=out_features] in normal form.

        W[k, n] = scales[g(k), n] * (q[k, n] - qzeros[g(k), n])
        g(k)    = g_idx[k], or k // group_size where g_idx is None

    Arrays are pytree leaves; the integers are static. Construction does not validate, because the
    leaves may be tracers, stacked arrays or `ShapeDtypeStruct`s; `from_raw` does.

    Attributes:
      qweight: uint32 [ceil(K * bits / 32), N]. The codes q as a dense little-endian bit stream
        along K, one stream per column (`packing.unpack_codes`).
      scales: float16, bfloat16 or float32 [G, N], as stored; differentiable.
      qzeros: uint8 [G, N]. True zero points, 0 <= z < 2**bits, not packed.
      g_idx: int32 [K] with 0 <= g_idx < G, or None for consecutive groups.
      bits: code width, 2 to 8.
      group_size: rows per group, at least 1; G = ceil(K / group_size) where g_idx is None.
      in_features: K.
      out_features: N.
    """

    qweight: Array
    scales: Array
    qzeros: Array
    g_idx: Array | None
    bits: int = static_field()
    group_size: int = static_field()
    in_features: int = static_field()
    out_features: int = static_field()

    @classmethod
    def from_raw(
        cls,
        qweight: ArrayLike,
        scales: ArrayLike,
        qzeros: ArrayLike,
        g_idx: ArrayLike | None = None,
        bits: int = 4,
        group_size: int = 128,
        in_features: int | None = None,
        out_features: int | None = None,
        checkpoint_format: str = "gptq",
        zero_add: str = "field",
        *,
        sym: bool | None = None,
        name: str = "",
    ) -> "GptqWeight":
        """Build the normal form from the tensors of a GPTQ checkpoint.

        Args:
          qweight: int32 or uint32 [ceil(K * bits / 32), N], packed along K.
          scales: float16, bfloat16 or float32 [G, N].
          qzeros: int32 or uint32 [G, ceil(N * bits / 32)], packed along N.
          g_idx: integers [K], or None for k // group_size.
          bits: code width, 2 to 8.
          group_size: rows per group; -1 means K.
          in_features: K; None derives it from `qweight` (a whole number of words per column).
          out_features: N; None takes `qweight.shape[1]`.
          checkpoint_format: "gptq" (v1: stores z - 1) or "gptq_v2" (stores z).
          zero_add: how v1 zeros are restored. "field" adds one to each field modulo 2**bits
            (AutoGPTQ, GPTQ-for-LLaMa); "word" adds 0x1111... to the whole word, which undoes the
            borrow that GPTQModel leaves at z = 0 (2, 4 and 8 bits; else field-wise).
          sym: True means every zero point is 2**(bits - 1): the stored fields then decide between
            v1 and v2 whatever the label says, and anything else is refused.
          name: the module's name, for error messages.

        Raises:
          BitsError, ShapeError, DtypeError, GroupIndexError, ScalesError, ZeroPointError,
          CheckpointFormatError: what was found, expected, and what to do.
        """
        where = f"{name}." if name else ""
        if bits not in range(2, 9):
            raise BitsError(f"{where}qweight: bits must be 2 to 8, found {bits!r}")
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise CheckpointFormatError(
                f"{where}qzeros: checkpoint_format must be one of {CHECKPOINT_FORMATS}, found "
                f"{checkpoint_format!r}"
            )
        if zero_add not in ZERO_ADD_RULES:
            raise CheckpointFormatError(
                f"{where}qzeros: zero_add must be one of {ZERO_ADD_RULES}, found {zero_add!r}"
            )
        words = _as_words(qweight, f"{where}qweight")
        zero_words = _as_words(qzeros, f"{where}qzeros")
        group_scales = _as_scales(scales, f"{where}scales")

        out_features = words.shape[1] if out_features is None else out_features
        in_features = words.shape[0] * 32 // bits if in_features is None else in_features
        if group_size != -1 and group_size < 1:
            raise ShapeError(
                f"{where}scales: group_size must be -1 or at least 1, found {group_size}"
            )
        group_size = in_features if group_size == -1 else group_size
        groups = group_scales.shape[0]
        _expect_shape(
            words,
            (packed_rows(in_features, bits), out_features),
            f"{where}qweight",
            f"in_features={in_features}, out_features={out_features}, bits={bits}",
        )
        _expect_shape(
            group_scales, (groups, out_features), f"{where}scales", f"out_features={out_features}"
        )
        _expect_shape(
            zero_words,
            (groups, packed_rows(out_features, bits)),
            f"{where}qzeros",
            f"{groups} groups (rows of scales), out_features={out_features}, bits={bits}",
        )
        row_groups = None
        if g_idx is not None:
            row_groups = _normal_g_idx(g_idx, in_features, group_size, groups, f"{where}g_idx")
        if row_groups is None and groups != -(-in_features // group_size):
            raise ShapeError(
                f"{where}scales: {groups} groups found, but in_features={in_features} with "
                f"group_size={group_size} has {-(-in_features // group_size)}; check group_size, "
                f"or pass g_idx"
            )
        unpack = unpack_codes_on_host if isinstance(zero_words, np.ndarray) else unpack_codes
        fields: Any = unpack(zero_words.T, bits, out_features).T
        if sym:
            zeros: Any = _symmetric_zeros(fields, bits, f"{where}qzeros")
        elif checkpoint_format == "gptq_v2":
            zeros = fields
        elif zero_add == "word" and 32 % bits == 0:
            ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
            zeros = unpack((zero_words + ones).T, bits, out_features).T
        else:
            zeros = (fields + np.uint8(1)) & np.uint8(2**bits - 1)
        return cls(
            jnp.asarray(words),
            jnp.asarray(group_scales),
            jnp.asarray(zeros),
            None if row_groups is None else jnp.asarray(row_groups),
            bits,
            group_size,
            in_features,
            out_features,
        )

    @classmethod
    def zeros(
        cls,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 128,
        desc_act: bool = False,
    ) -> "GptqWeight":
        """Zero codes, zero points and f16 scales, to be restored into; group_size -1 means K."""
        group_size = in_features if group_size == -1 else group_size
        groups = -(-in_features // group_size)
        return cls(
            jnp.zeros((packed_rows(in_features, bits), out_features), jnp.uint32),
            jnp.zeros((groups, out_features), jnp.float16),
            jnp.zeros((groups, out_features), jnp.uint8),
            jnp.zeros((in_features,), jnp.int32) if desc_act else None,
            bits,
            group_size,
            in_features,
            out_features,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) of the matrix that this weight stands for."""
        return self.in_features, self.out_features

    @property
    def groups(self) -> int:
        """G, the number of groups."""
        return self.scales.shape[-2]


def side_by_side(weights: Sequence[GptqWeight]) -> GptqWeight:
    """The columns of all as one weight; everything but their number is as in the first."""

    def joined(name: str) -> Array:
        return jnp.concatenate([getattr(weight, name) for weight in weights], axis=1)

    return dataclasses.replace(
        weights[0],
        qweight=joined("qweight"),
        scales=joined("scales"),
        qzeros=joined("qzeros"),
        out_features=sum(weight.out_features for weight in weights),
    )


def is_concrete(x: Any) -> bool:
    """Whether the values of an array can be looked at (it is not being traced)."""
    return not isinstance(x, jax.core.Tracer)


def _as_words(x: ArrayLike, name: str) -> Any:
    """View int32 as uint32 without changing a bit; refuse everything else."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype not in (np.int32, np.uint32):
        raise DtypeError(
            f"{name}: expected int32 (packed codes), found {x.dtype}; packed tensors must not be "
            f"cast when a checkpoint is loaded"
        )
    if x.ndim != 2:
        raise ShapeError(f"{name}: expected 2 dimensions, found shape {x.shape}")
    if isinstance(x, np.ndarray):
        return x.view(np.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _as_scales(x: ArrayLike, name: str) -> Any:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.dtype.name not in SCALE_DTYPES:
        raise DtypeError(f"{name}: expected one of {SCALE_DTYPES}, found {x.dtype}")
    if x.ndim != 2:
        raise ShapeError(f"{name}: expected 2 dimensions [groups, N], found shape {x.shape}")
    if is_concrete(x):
        finite = np.isfinite(np.asarray(x, np.float32))
        if not finite.all():
            group, column = np.argwhere(~finite)[0]
            raise ScalesError(
                f"{name}: expected finite values, found {np.asarray(x)[group, column]} at "
                f"[{group}, {column}] and {finite.size - finite.sum()} non-finite in all; the "
                f"checkpoint is damaged or was written from a failed quantization"
            )
    return x


def _expect_shape(x: Any, expected: tuple[int, int], name: str, because: str) -> None:
    if x.shape != expected:
        raise ShapeError(
            f"{name}: expected shape {expected} for {because}; found {x.shape}. Check bits and "
            f"the features in the configuration"
        )


def _normal_g_idx(
    g_idx: ArrayLike, in_features: int, group_size: int, groups: int, name: str
) -> Array | np.ndarray | None:
    """Validated int32 g_idx, or None where it says no more than k // group_size."""
    g_idx = g_idx if isinstance(g_idx, jax.Array) else np.asarray(g_idx)
    if not jnp.issubdtype(g_idx.dtype, jnp.integer):
        raise GroupIndexError(f"{name}: expected integers, found dtype {g_idx.dtype}")
    if g_idx.shape != (in_features,):
        raise GroupIndexError(
            f"{name}: expected shape ({in_features},), one group per input feature; found "
            f"{g_idx.shape}"
        )
    if not is_concrete(g_idx):
        return g_idx.astype(jnp.int32)
    values = np.asarray(g_idx)
    outside = (values < 0) | (values >= groups)
    if outside.any():
        k = int(np.argmax(outside))
        raise GroupIndexError(
            f"{name}: expected 0 <= g_idx < {groups} (rows of scales), found {values[k]} at row "
            f"{k}; the tensors do not belong together, or group_size is wrong"
        )
    if np.array_equal(values, np.arange(in_features) // group_size):
        return None
    return values.astype(np.int32)


def _symmetric_zeros(fields: Array, bits: int, name: str) -> Array | np.ndarray:
    """Zero points of a symmetric weight: all 2**(bits-1), stored as v1 (less one) or as v2."""
    middle = 2 ** (bits - 1)
    zeros = np.full(fields.shape, middle, np.uint8)
    if is_concrete(fields):
        found = np.unique(np.asarray(fields))
        if found.tolist() not in ([middle - 1], [middle], []):
            raise ZeroPointError(
                f"{name}: sym is true, so every stored zero must be {middle - 1} "
                f"(checkpoint_format gptq) or every one {middle} (gptq_v2); found "
                f"{found[:8].tolist()}. Set sym to false if the zero points are meant"
            )
    return zeros
