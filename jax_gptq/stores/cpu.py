"""The `cpu` layout: tiles in the order in which the native host kernel (`xla_ffi/cpu`) reads them.

Rows of W are ordered by group, each group padded to a whole number of chunks of 32 rows; columns
are padded to tiles of 32. One 32-bit word belongs to one column, and a chunk holds `bits` words
per column (5, 6 and 7 bits are held as 8). In the word, byte b of quad j stands for row 4j + b:

    4 bits,      |  byte 3 (top)   |     byte 2      |     byte 1      |     byte 0      |
    word w       |  high     low   |  high     low   |  high     low   |  high     low   |
    holds row    | 8w + 7   8w + 3 | 8w + 6   8w + 2 | 8w + 5   8w + 1 | 8w + 4   8w     |

so that masking the low nibbles gives the four codes of quad 2w, one per byte, and the high nibbles
those of quad 2w + 1: each is an operand of an 8-bit dot-product instruction as it stands. 2 bits
put four quads into a word (word w, bits 2i: quad 4w + i), 8 bits one, and 3 bits are a 2-bit plane
(words 0 and 1) and the plane of the top bit (word 2, bit i: quad i).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jax_gptq import ffi, host
from jax_gptq.errors import LayoutError
from jax_gptq.packing import pack_codes, unpack_codes_on_host
from jax_gptq.pytree import register_pytree, static_field
from jax_gptq.stores.columns import by_group, by_tile
from jax_gptq.weight import GptqWeight

TARGET = "jax_gptq.cpu.matmul.v1"
TILE_COLUMNS = 32
CHUNK_ROWS = 32
# Rows of padding per row of W that are still worth holding: groups of 8 rows are 4 to 1.
MAX_PADDING = 4
# Columns are repacked by slabs of at most this many codes, so that packing needs little memory.
_SLAB_CODES = 1 << 23


@register_pytree
@dataclasses.dataclass(frozen=True)
class CpuStore:
    """A `GptqWeight` as tiles for the native host kernel; a bijection.

    Attributes:
      tiles: uint32 [T, C, B, 32], T = ceil(N / 32) tiles of columns, C chunks of 32 rows, B words
        per column and chunk: `bits`, or 8 for 5, 6 and 7 bits. Padding is zero.
      scales: float16, bfloat16 or float32 [T, G, 32], as stored in the weight.
      qzeros: uint8 [T, G, 32].
      perm: int32 [K], the rows of W in order of their group, or None where they are in order.
      group_starts: int32 [G + 1], where in `perm` each group starts, or None with `perm`.
      bits, group_size, in_features, out_features: as in the weight.
    """

    platform: ClassVar[str] = "cpu"
    layout: ClassVar[str] = "cpu"
    backends: ClassVar[dict[str, str]] = {"cpu": "cpu"}
    targets: ClassVar[tuple[str, ...]] = (TARGET,)

    tiles: Array
    scales: Array
    qzeros: Array
    perm: Array | None
    group_starts: Array | None
    bits: int = static_field()
    group_size: int = static_field()
    in_features: int = static_field()
    out_features: int = static_field()

    @staticmethod
    def unsupported(weight: GptqWeight) -> str | None:
        """Why the tiles cannot hold `weight`: its groups are too small. None if they can."""
        if weight.in_features == 0 or weight.out_features == 0:
            return f"a weight of shape {weight.shape} is empty"
        groups = weight.groups
        if weight.g_idx is None:
            last = weight.in_features - (groups - 1) * weight.group_size
            padded = CHUNK_ROWS * ((groups - 1) * _chunks(weight.group_size) + _chunks(last))
        else:  # At most this many rows, whatever the groups' sizes.
            padded = weight.in_features + groups * (CHUNK_ROWS - 1)
        if padded - weight.in_features > MAX_PADDING * max(weight.in_features, CHUNK_ROWS):
            return (
                f"{groups} groups over {weight.in_features} rows are too small: each is padded to "
                f"a multiple of {CHUNK_ROWS} rows"
            )
        return None

    @classmethod
    def pack(cls, weight: GptqWeight) -> "CpuStore":
        """Repack `weight`, on the host, by slabs of columns.

        Raises:
          LayoutError: `unsupported(weight)` gives a reason.
        """
        reason = cls.unsupported(weight)
        if reason:
            raise LayoutError(f'layout "cpu": {reason}; use layout="reference" or "dense"')
        k, n, groups = weight.in_features, weight.out_features, weight.groups
        perm, starts = None, _regular_starts(weight)
        if weight.g_idx is not None:
            g_idx = np.asarray(weight.g_idx)
            perm = np.argsort(g_idx, kind="stable").astype(np.int32)
            starts = np.searchsorted(g_idx[perm], np.arange(groups + 1)).astype(np.int32)
        slots, chunks = _slots(starts, k)
        rows = np.full(chunks * CHUNK_ROWS, k, np.int32)  # row k is the padding
        rows[slots] = np.arange(k) if perm is None else perm

        tiles = host.empty((_tiles(n), chunks, _words(weight.bits), TILE_COLUMNS), np.uint32)
        qweight = np.asarray(weight.qweight)
        slab = max(1, _SLAB_CODES // (len(rows) * TILE_COLUMNS))
        for first in range(0, len(tiles), slab):
            words = qweight[:, first * TILE_COLUMNS : (first + slab) * TILE_COLUMNS]
            tiles[first : first + slab] = _pack_tiles(words, weight.bits, rows, k)
        return cls(
            jax.device_put(tiles),
            jnp.asarray(by_tile(np.asarray(weight.scales), TILE_COLUMNS)),
            jnp.asarray(by_tile(np.asarray(weight.qzeros), TILE_COLUMNS)),
            None if perm is None else jnp.asarray(perm),
            None if perm is None else jnp.asarray(starts),
            weight.bits,
            weight.group_size,
            k,
            n,
        )

    def unpack(self) -> GptqWeight:
        """The exact inverse of `pack`, in jnp: it can be traced."""
        k, n = self.in_features, self.out_features
        codes = _unpack_tiles(self.tiles, self.bits)[:, :n]
        g_idx = None
        if self.perm is None or self.group_starts is None:
            slots, _ = _slots(_regular_starts(self), k)
            codes = codes[:k] if np.array_equal(slots, np.arange(k)) else codes[slots]
        else:
            row = jnp.arange(k, dtype=jnp.int32)
            group = jnp.searchsorted(self.group_starts, row, side="right").astype(jnp.int32) - 1
            chunks = _chunks(jnp.diff(self.group_starts))
            first = jnp.cumsum(chunks, dtype=jnp.int32) - chunks
            slot = first[group] * CHUNK_ROWS + row - self.group_starts[group]
            codes = codes[jnp.zeros(k, jnp.int32).at[self.perm].set(slot)]
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
        """None: the kernel takes every activation dtype, and both modes."""
        return None

    def ffi_call(
        self,
        x: Array,
        bias: Array | None,
        *,
        backend: str = "cpu",
        activations: str | None = None,
        x_permuted: bool = False,
        out_dtype: DTypeLike,
    ) -> Array:
        """x [M, K] @ W + bias -> [M, N] in `out_dtype`, by the native kernel, as if x had it.

        x in blocks of at most 128 rows of one group is written as fixed point, a power of two
        times a sum of int8 digits in base 256: three for float32 and float16 (integers below 2**22
        are exact), two for bfloat16. The products with the integers q - z are summed exactly; the
        scales apply in f32 and the blocks' terms are added with compensation. With f32 activations
        an output is therefore off by at most

            2**-21 * sum over groups of max|x_g| * sum|W_g|

        and with bfloat16 by 2**-13 of that sum before the one rounding. A row with a NaN, an
        infinity, a block whose largest value is not in [2**-64, 2**65), or one whose largest value
        exceeds 32 times the root mean square of the block's others, is computed by f32 FMA instead;
        the choice depends on that row alone. `activations="int8"` keeps one digit per 32 rows
        (relative error about 5e-3).

        The result does not depend on the number of rows or threads: row i of a batch has the same
        bits as row i alone, at every M (from some number of rows on, 24 with AVX-512, codes are
        widened once for all rows, to the same integers).
        """
        del backend  # There is one.
        x = x.astype(out_dtype)
        empty = jnp.zeros(0, jnp.int32)
        gathered = self.perm is not None and not x_permuted
        call = jax.ffi.ffi_call(
            TARGET, ffi.result_type((x.shape[0], self.out_features), x.dtype, like=x)
        )
        return call(
            x,
            self.tiles,
            self.scales,
            self.qzeros,
            self.perm if gathered else empty,
            empty if self.group_starts is None else self.group_starts,
            jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32),
            group_size=np.int32(self.group_size),
            int8_activations=np.int32(activations == "int8"),
        )


def _words(bits: int) -> int:
    """Words per column and chunk."""
    return bits if bits <= 4 else 8


def _tiles(columns: int) -> int:
    return -(-columns // TILE_COLUMNS)


def _chunks(rows):
    return -(-rows // CHUNK_ROWS)


def _regular_starts(weight: "GptqWeight | CpuStore") -> np.ndarray:
    """`group_starts` of consecutive groups of `group_size` rows."""
    groups = -(-weight.in_features // weight.group_size)
    return np.minimum(np.arange(groups + 1) * weight.group_size, weight.in_features)


def _slots(starts: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Where each row, in order of group, is among the padded rows; the number of chunks."""
    chunks = _chunks(np.diff(starts))
    first = np.cumsum(chunks) - chunks
    shift = np.repeat(first * CHUNK_ROWS - starts[:-1], np.diff(starts))
    return np.arange(k) + shift, int(chunks.sum())


def _pack_tiles(qweight: np.ndarray, bits: int, rows: np.ndarray, k: int) -> np.ndarray:
    """uint32 [ceil(K * bits / 32), columns] -> uint32 [T, C, B, 32]; `rows` K means padding."""
    columns = qweight.shape[1]
    codes = np.zeros((k + 1, _tiles(columns) * TILE_COLUMNS), np.uint8)
    codes[:k, :columns] = unpack_codes_on_host(qweight, bits, k)
    if not np.array_equal(rows, np.arange(k)):
        codes = codes[rows]
    quads = codes[: len(rows)].reshape(-1, 8, 4, codes.shape[1])
    if bits == 3:
        planes = np.concatenate([_merge_quads(quads & 3, 2), _merge_quads(quads >> 2, 1)], axis=1)
    else:
        planes = _merge_quads(quads, _words(bits))
    planes = planes.reshape(*planes.shape[:3], -1, TILE_COLUMNS)  # [C, B, byte, T, 32]
    return np.ascontiguousarray(planes.transpose(3, 0, 1, 4, 2)).view(np.uint32)[..., 0]


def _merge_quads(quads: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [C, 8, 4, columns], fields of `bits` bits -> [C, bits, 4, columns], whole bytes."""
    merged = quads[:, :: 8 // bits].copy()
    for i in range(1, 8 // bits):
        merged |= quads[:, i :: 8 // bits] << (bits * i)
    return merged


def _unpack_tiles(tiles: Array, bits: int) -> Array:
    """uint32 [T, C, B, 32] -> codes uint8 [C * 32, T * 32], in jnp."""
    planes = jax.lax.bitcast_convert_type(tiles, jnp.uint8)  # [T, C, B, 32, byte]
    if bits == 3:
        quads = _split_quads(planes[:, :, :2], 2) | _split_quads(planes[:, :, 2:], 1) << 2
    else:
        quads = _split_quads(planes, _words(bits))
    tile_count, chunks = tiles.shape[:2]
    quads = quads.transpose(1, 2, 4, 0, 3)  # [C, 8, byte, T, 32]
    return quads.reshape(chunks * CHUNK_ROWS, tile_count * TILE_COLUMNS)


def _split_quads(planes: Array, bits: int) -> Array:
    """uint8 [T, C, words, 32, byte] -> [T, C, 8, 32, byte], fields of `bits` bits."""
    fields = [planes >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    quads = jnp.stack(fields, axis=3)
    return quads.reshape(*planes.shape[:2], 8, *planes.shape[3:])
