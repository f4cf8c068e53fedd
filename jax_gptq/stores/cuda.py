"""The `cuda` layout: tiles of 64 x 64 in the order of the tensor cores' fragments.

`xla_ffi/cuda/layout.h` draws the layout; in short, a tile holds 64 output features n and 64 input
features k (32 at 8 bits), and in it

    [16-row fragment of n: 4][lane: 32][16 bytes],   lane = 4 * (n % 8) + (k % 8) // 2

where a lane's 16 bytes are its codes for four steps of 16 along k (two at 8 bits). With the
register r = (n // 8) % 2 + 2 * ((k // 8) % 2) of a fragment and h = k % 2, nibble r + 4 h of the
step's word holds the code at 4 bits, and byte (r % 2) + 2 h of its word r // 2 at 8 bits. 2 and 3
bits are held as 4, and 5 to 7 as 8. Rows are ordered by group; K and N are padded to whole tiles.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_gptq import ffi
from jax_gptq.errors import LayoutError
from jax_gptq.packing import pack_codes, unpack_codes_on_host
from jax_gptq.pytree import register_pytree, static_field
from jax_gptq.stores.columns import by_group, by_tile
from jax_gptq.stores.cuda_crossover import dequantize_from_rows
from jax_gptq.weight import GptqWeight, is_concrete

TILE = 64
# Group sizes below K are multiples of the tensor cores' step along K.
GROUP_STEP = 16
# As kWorkspaceBytes in xla_ffi/cuda/plan.h: enough for every shape and architecture.
WORKSPACE_BYTES = 17 << 20
# Backend -> the middle part of its FFI targets' names.
_MODULES = {"cuda": "cuda", "cuda-emulated": "cuda_emulated"}
# Columns are repacked by slabs of at most this many codes, so that packing needs little memory.
_SLAB_CODES = 1 << 24


def target(backend: str, kernel: str) -> str:
    """FFI target of a kernel ("matmul", "dequantize", "pack", "unpack"); a contract."""
    return f"jax_gptq.{_MODULES[backend]}.{kernel}.v1"


@register_pytree
@dataclasses.dataclass(frozen=True)
class CudaStore:
    """A `GptqWeight` as tiles for the CUDA kernels; a bijection.

    T = ceil(N / 64) tiles of columns, S = ceil(K / 64) steps along K, G groups.

    Attributes:
      codes: uint32 [T, S, 4, 32, 4] at up to 4 bits, [T, 2 S, 4, 32, 4] above: one tile each.
      scales: float16, bfloat16 or float32 [T, G, 64], as stored in the weight.
      qzeros: uint8 [T, G, 64].
      perm: int32 [K], the rows of W in order of their group, or None where they are in order.
      bits, group_size, in_features, out_features: as in the weight.
    """

    platform: ClassVar[str] = "cuda"
    layout: ClassVar[str] = "cuda"
    backends: ClassVar[dict[str, str]] = {"cuda": "cuda", "cuda-emulated": "cpu"}
    targets: ClassVar[tuple[str, ...]] = tuple(
        target(backend, kernel) for backend in _MODULES for kernel in ("matmul", "dequantize")
    )

    codes: Array
    scales: Array
    qzeros: Array
    perm: Array | None
    bits: int = static_field()
    group_size: int = static_field()
    in_features: int = static_field()
    out_features: int = static_field()

    @staticmethod
    def unsupported(weight: GptqWeight) -> str | None:
        """Why the tiles cannot hold `weight`; None if they can.

        They hold groups of equal size, a multiple of 16 (the last may be smaller) or all of K.
        Whether the groups of a `g_idx` are equal is known only where its values can be seen.
        """
        k, size = weight.in_features, weight.group_size
        if k == 0 or weight.out_features == 0:
            return f"a weight of shape {weight.shape} is empty"
        if size < k and size % GROUP_STEP:
            return f"group_size {size} is not a multiple of {GROUP_STEP}"
        g_idx = weight.g_idx
        if g_idx is not None and isinstance(g_idx, (jax.Array, np.ndarray)) and is_concrete(g_idx):
            if not np.array_equal(np.sort(np.asarray(g_idx)), np.arange(k) // size):
                return f"g_idx makes groups that do not have {size} rows each"
        elif weight.groups != -(-k // size):
            return f"{weight.groups} groups of {size} rows do not make {k} rows"
        return None

    @classmethod
    def pack(cls, weight: GptqWeight) -> "CudaStore":
        """Repack `weight`: by a kernel where it is on a GPU, else on the host by slabs of columns.

        Raises:
          LayoutError: `unsupported(weight)` gives a reason.
        """
        reason = cls.unsupported(weight)
        if reason:
            raise LayoutError(f'layout "cuda": {reason}; use layout="reference" or "dense"')
        perm = None
        if weight.g_idx is not None:
            perm = np.argsort(np.asarray(weight.g_idx), kind="stable").astype(np.int32)
        zeros = by_tile(np.asarray(weight.qzeros), TILE)
        on_device = ffi.has("cuda") and _platform(weight.qweight) == "gpu"
        if on_device:
            codes = _pack_on_device(weight, perm, zeros)
        else:
            codes = jnp.asarray(_pack_on_host(weight, perm))
        return cls(
            codes,
            jnp.asarray(by_tile(np.asarray(weight.scales), TILE)),
            jnp.asarray(zeros),
            None if perm is None else jnp.asarray(perm),
            weight.bits,
            weight.group_size,
            weight.in_features,
            weight.out_features,
        )

    def unpack(self) -> GptqWeight:
        """The exact inverse of `pack`, in jnp: it can be traced."""
        k, n = self.in_features, self.out_features
        codes = _untile(self.codes, _held_bits(self.bits))[:k, :n]
        g_idx = None
        if self.perm is not None:
            codes = jnp.zeros_like(codes).at[self.perm].set(codes)
            group = jnp.arange(k, dtype=jnp.int32) // self.group_size
            g_idx = jnp.zeros(k, jnp.int32).at[self.perm].set(group)
        return GptqWeight(
            pack_codes(codes, self.bits),
            by_group(self.scales, n),
            by_group(self.qzeros, n),
            g_idx,
            self.bits,
            self.group_size,
            k,
            n,
        )

    def supports(self, x_dtype: DTypeLike, activations: str | None) -> str | None:
        """Why the kernels cannot take these activations: they take float16 and bfloat16."""
        if activations is not None:
            return f'the CUDA kernels have no activations="{activations}" mode'
        if jnp.dtype(x_dtype).name not in ("float16", "bfloat16"):
            return (
                f"the CUDA kernels take float16 and bfloat16 activations, found "
                f"{jnp.dtype(x_dtype).name}"
            )
        return None

    def ffi_call(
        self,
        x: Array,
        bias: Array | None,
        *,
        backend: str = "cuda",
        activations: str | None = None,
        x_permuted: bool = False,
        out_dtype: DTypeLike,
    ) -> Array:
        """x [M, K] @ W + bias -> [M, N] in x's dtype or f32, by the CUDA kernels.

        At M <= 8 (M <= 16 on other GPUs, and on Hopper where an estimate says so) the exact
        integers q - z are multiplied and the scales apply to f32 sums, so that a 16-bit output is
        rounded once (but for a K so long that x has no room in shared memory). Above, each weight
        may be rounded once to x's dtype too, and the result stays within 2.5 times the output
        rounding (5e-3 bfloat16, 6e-4 float16). The handler chooses from the buffer's shape; where M
        is a Python int and large (see `cuda_crossover.dequantize_from_rows`), the weight is
        dequantized by a kernel and XLA multiplies. Row i of a batch has the same bits at M = 3 and
        4, at M = 5 to 8 and at M = 9 to 16; otherwise, where the cuts of K change with M, it is as
        accurate. On Hopper equal rows of more than 16 may differ in their last bits, since K may be
        cut elsewhere for them.
        """
        del activations  # There is one mode.
        if self.perm is not None and not x_permuted:
            x = jnp.take(x, self.perm, axis=1)
        rows, k, n = x.shape[0], self.in_features, self.out_features
        if isinstance(rows, int) and rows >= dequantize_from_rows(k, n):
            return self._dequantize_then_dot(x, bias, backend, out_dtype)
        y, _ = jax.ffi.ffi_call(
            target(backend, "matmul"),
            (
                ffi.result_type((rows, n), out_dtype, like=x),
                ffi.result_type((WORKSPACE_BYTES,), jnp.uint8, like=x),
            ),
        )(
            x,
            self.codes,
            self.scales,
            self.qzeros,
            jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
            group_size=np.int32(self.group_size),
            bits=np.int32(_held_bits(self.bits)),
        )
        return y

    def _dequantize_then_dot(
        self, x: Array, bias: Array | None, backend: str, out_dtype: DTypeLike
    ) -> Array:
        """The weight as [N, K] in x's dtype, each value rounded once, and XLA's product."""
        transposed = jax.ffi.ffi_call(
            target(backend, "dequantize"),
            ffi.result_type((self.out_features, self.in_features), x.dtype, like=x),
        )(
            self.codes,
            self.scales,
            self.qzeros,
            group_size=np.int32(self.group_size),
            bits=np.int32(_held_bits(self.bits)),
        )
        # Sums are f32 either way; without a bias the product rounds them, in no pass of its own.
        y = jax.lax.dot_general(
            x,
            transposed,
            (((1,), (1,)), ((), ())),
            preferred_element_type=out_dtype if bias is None else jnp.float32,
        )
        return y if bias is None else (y + bias.astype(jnp.float32)).astype(out_dtype)


def _held_bits(bits: int) -> int:
    """Width in which a code is held."""
    return 4 if bits <= 4 else 8


def _platform(x: Array) -> str:
    return min(x.devices(), key=lambda d: d.id).platform if isinstance(x, jax.Array) else "cpu"


def _codes_shape(weight: GptqWeight) -> tuple[int, ...]:
    tiles, steps = -(-weight.out_features // TILE), -(-weight.in_features // TILE)
    return tiles, steps * _held_bits(weight.bits) // 4, 4, 32, 4


def _pack_on_device(weight: GptqWeight, perm: np.ndarray | None, zeros: np.ndarray) -> Array:
    """Codes as tiles, by the repacking kernel."""
    return jax.ffi.ffi_call(
        target("cuda", "pack"), jax.ShapeDtypeStruct(_codes_shape(weight), jnp.uint32)
    )(
        weight.qweight,
        zeros,
        np.zeros(0, np.int32) if perm is None else perm,
        bits=np.int32(weight.bits),
        group_size=np.int32(weight.group_size),
        in_features=np.int32(weight.in_features),
    )


def _pack_on_host(weight: GptqWeight, perm: np.ndarray | None) -> np.ndarray:
    """Codes as tiles, by slabs of columns."""
    k, n, held = weight.in_features, weight.out_features, _held_bits(weight.bits)
    qweight, last_zeros = np.asarray(weight.qweight), np.asarray(weight.qzeros)[-1]
    codes = np.empty(_codes_shape(weight), np.uint32)
    padded_k = codes.shape[1] * TILE * 4 // held
    slab = max(1, _SLAB_CODES // (padded_k * TILE))
    for first in range(0, len(codes), slab):
        columns = slice(first * TILE, min((first + slab) * TILE, n))
        rows = unpack_codes_on_host(qweight[:, columns], weight.bits, k)
        padded = np.zeros((padded_k, -(-rows.shape[1] // TILE) * TILE), np.uint8)
        padded[:k, : rows.shape[1]] = rows if perm is None else rows[perm]
        padded[k:, : rows.shape[1]] = last_zeros[columns]  # dequantizes to zero
        codes[first : first + slab] = _tile(padded, held)
    return codes


# Axes of codes [K, N] split as the layout needs them, k from the highest: step of 64 or 32, step of
# 16, half of the step, lane, pair; n: tile, fragment, half of the fragment, lane.
_STEP, _PART, _K_HALF, _K_LANE, _PAIR, _TILE, _FRAGMENT, _N_HALF, _N_LANE = range(9)
_OUTER = (_TILE, _STEP, _FRAGMENT, _N_LANE, _K_LANE, _PART)


def _order(held: int) -> tuple[int, ...]:
    """Order of the axes in memory, slowest first."""
    if held == 4:
        return (*_OUTER, _PAIR, _K_HALF, _N_HALF)
    return (*_OUTER, _K_HALF, _PAIR, _N_HALF)


def _split_shape(k: int, n: int, held: int) -> tuple[int, ...]:
    parts = 16 // held
    return (k // (16 * parts), parts, 2, 4, 2, n // TILE, 4, 2, 8)


def _tile(codes: np.ndarray, held: int) -> np.ndarray:
    """uint8 [K, N] -> uint32 [T, steps, 4, 32, 4]; K and N multiples of 64."""
    k, n = codes.shape
    shape = _split_shape(k, n, held)
    values = codes.reshape(shape).transpose(_order(held))
    if held == 4:
        values = values[..., 0] | values[..., 1] << 4
    values = np.ascontiguousarray(values).reshape(shape[_TILE], shape[_STEP], 4, 32, 16)
    return values.view(np.uint32)


def _untile(tiles: Array, held: int) -> Array:
    """uint32 [T, steps, 4, 32, 4] -> uint8 [K, N], in jnp."""
    values = jax.lax.bitcast_convert_type(tiles, jnp.uint8)
    if held == 4:
        values = jnp.stack([values & 15, values >> 4], axis=-1)
    n, k = tiles.shape[0] * TILE, tiles.shape[1] * TILE * 4 // held
    shape, order = _split_shape(k, n, held), _order(held)
    values = values.reshape([shape[axis] for axis in order])
    return values.transpose(np.argsort(order)).reshape(k, n)
