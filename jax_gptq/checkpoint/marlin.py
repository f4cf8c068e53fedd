"""Reads Marlin-serialized tensors (AutoGPTQ with `is_marlin_format`): symmetric, 4 bits.

    B int32 [K / 16, 2 N], s float16 [G, N]; group size 128 or K; K % 128 == 0, N % 256 == 0

A row of B holds 16 rows of W. Per 64 columns it has 128 words, 4 for each of 32 lanes. Nibble e of
word j of a lane is, with t = ORDER[e], the code at

    k = 2 * (lane % 4) + 8 * (t // 2 % 2) + t % 2        n = 16 * j + 8 * (t // 4) + lane // 4

Scales are permuted: per 64 columns an 8 x 8 transpose, or with one group per channel
s'[8 i + j] = s[2 i + (0, 1, 8, 9, 16, 17, 24, 25)[j]] per 32 columns
(auto_gptq/nn_modules/qlinear/qlinear_marlin.py).
"""

import numpy as np

from jax_gptq.checkpoint.config import ModuleConfig
from jax_gptq.checkpoint.files import ModuleTensors
from jax_gptq.errors import BitsError, DtypeError, ShapeError
from jax_gptq.weight import GptqWeight

SUFFIXES = ("B", "s")
MARKERS = ("B",)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(tensors: ModuleTensors, config: ModuleConfig) -> GptqWeight:
    """The weight of one module, in the ordinary order.

    Raises:
      MissingTensorError, BitsError, ShapeError, DtypeError, ScalesError: naming file and tensor.
    """
    words, scales = tensors.matrix("B"), tensors.matrix("s")
    (rows, columns), (groups, n) = words.shape, scales.shape
    k = rows * 16
    if config.bits not in (4, None):
        raise BitsError(
            f"{tensors.where('B')}: expected 4 bits, the only width of the Marlin format, found "
            f"bits={config.bits} in {config.source}"
        )
    if words.dtype != np.int32:
        raise DtypeError(f"{tensors.where('B')}: expected int32, found {words.dtype}")
    if columns != 2 * n or n % 256 or k % 128:
        raise ShapeError(
            f"{tensors.where('B')}: expected (K / 16, 2 N) with K a multiple of 128 and N={n} one "
            f"of 256, found {words.shape}; the checkpoint is damaged or not in the Marlin format"
        )
    size = config.group_size
    if size is None:
        size = k if groups == 1 else 128
    size = k if size == -1 else size
    if size not in (128, k) or groups != k // size:
        raise ShapeError(
            f"{tensors.where('s')}: expected groups of 128 or of all {k} input features, as "
            f"group_size={config.group_size} in {config.source} says; found {groups} groups"
        )
    return GptqWeight.from_raw(
        _codes(words.view(np.uint32)),
        _channel_scales(scales) if groups == 1 else _grouped_scales(scales),
        np.full((groups, n // 8), 0x88888888, np.uint32),
        bits=4,
        group_size=size,
        in_features=k,
        out_features=n,
        checkpoint_format="gptq_v2",
        name=tensors.prefix,
    )


def _codes(words: np.ndarray) -> np.ndarray:
    """uint32 [K / 16, 2 N] -> uint32 [K / 8, N], the dense stream along K."""
    tiles, n = words.shape[0], words.shape[1] // 2
    lanes = words.reshape(tiles, n // 64, 8, 4, 4)  # tile of k, of n, lane // 4, lane % 4, j
    out = np.zeros((tiles, 2, n // 64, 4, 2, 8), np.uint32)  # .., k // 8, .., j, n // 8 % 2, n % 8
    for nibble, t in enumerate(ORDER):
        for lane in range(4):
            code = lanes[:, :, :, lane, :] >> np.uint32(4 * nibble) & np.uint32(15)
            k_in_word = 2 * lane + t % 2
            out[:, t // 2 % 2, :, :, t // 4] |= code.swapaxes(2, 3) << np.uint32(4 * k_in_word)
    return out.reshape(tiles * 2, n)


def _grouped_scales(scales: np.ndarray) -> np.ndarray:
    groups, n = scales.shape
    return scales.reshape(groups, n // 64, 8, 8).swapaxes(2, 3).reshape(groups, n)


def _channel_scales(scales: np.ndarray) -> np.ndarray:
    groups, n = scales.shape
    return scales.reshape(groups, n // 32, 4, 4, 2).swapaxes(2, 3).reshape(groups, n)
