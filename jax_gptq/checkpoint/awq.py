"""Reads AWQ `gemm` tensors (AutoAWQ, llm-awq): 4 bits, packed along N with a fixed interleave.

qweight int32 [K, N / 8]: nibble i of word c holds column 8 c + ORDER[i]
qzeros  int32 [G, N / 8]: the same, and stores z itself; absent where zero_point is false
scales  float [G, N]
"""

import numpy as np

from jax_gptq.checkpoint.config import ModuleConfig
from jax_gptq.checkpoint.files import ModuleTensors
from jax_gptq.errors import BitsError, ShapeError, ZeroPointError
from jax_gptq.weight import GptqWeight

SUFFIXES = ("qweight", "qzeros", "scales")
MARKERS = SUFFIXES
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SYMMETRIC_WORD = np.uint32(0x88888888)


def read(tensors: ModuleTensors, config: ModuleConfig) -> GptqWeight:
    """The weight of one module, repacked along K.

    Raises:
      MissingTensorError, BitsError, ShapeError, DtypeError, ScalesError, ZeroPointError: naming
      file and tensor.
    """
    qweight, scales = tensors.matrix("qweight"), tensors.matrix("scales")
    (k, words), (groups, n) = qweight.shape, scales.shape
    if config.bits not in (4, None):
        raise BitsError(
            f"{tensors.where('qweight')}: expected 4 bits, the only width of the AWQ gemm format, "
            f"found bits={config.bits} in {config.source}"
        )
    if words * 8 != n or k % 8:
        raise BitsError(
            f"{tensors.where('qweight')}: expected (K, {n // 8}) for 4 bits, N={n} and a multiple "
            f"of 8 rows, found {qweight.shape}; check w_bit and quant_method in {config.source}"
        )
    group_size = config.group_size
    if group_size is None:
        group_size = -(-k // groups)
    if groups != (1 if group_size == -1 else -(-k // group_size)):
        raise ShapeError(
            f"{tensors.where('scales')}: expected the groups of group_size={group_size} "
            f"({config.source}) over {k} input features, found {groups}; correct q_group_size"
        )
    return GptqWeight.from_raw(
        _pack_along_rows(qweight.view(np.uint32)),
        scales,
        _zeros(tensors, config, groups, n),
        bits=4,
        group_size=group_size,
        in_features=k,
        out_features=n,
        checkpoint_format="gptq_v2",
        name=tensors.prefix,
    )


def _zeros(tensors: ModuleTensors, config: ModuleConfig, groups: int, n: int) -> np.ndarray:
    """uint32 [G, N / 8] in the ordinary order of columns."""
    if config.sym and "qzeros" not in tensors:
        return np.full((groups, n // 8), _SYMMETRIC_WORD)
    words = tensors.matrix("qzeros")
    if words.shape != (groups, n // 8):
        raise ShapeError(
            f"{tensors.where('qzeros')}: expected {(groups, n // 8)}, found {words.shape}"
        )
    interleaved = words.view(np.uint32)
    if config.sym and (interleaved != _SYMMETRIC_WORD).any():
        raise ZeroPointError(
            f"{tensors.where('qzeros')}: zero_point is false in {config.source}, so every stored "
            f"zero must be 8, found others; set zero_point to true if they are meant"
        )
    ordered = np.zeros_like(interleaved)
    for nibble, column in enumerate(ORDER):
        ordered |= (interleaved >> np.uint32(4 * nibble) & np.uint32(15)) << np.uint32(4 * column)
    return ordered


def _pack_along_rows(words: np.ndarray) -> np.ndarray:
    """uint32 [K, N / 8] interleaved along N -> uint32 [K / 8, N] packed along K."""
    k, columns = words.shape
    packed = np.zeros((k // 8, columns, 8), np.uint32)
    for nibble, column in enumerate(ORDER):
        for row in range(8):
            code = words[row::8] >> np.uint32(4 * nibble) & np.uint32(15)
            packed[:, :, column] |= code << np.uint32(4 * row)
    return packed.reshape(k // 8, columns * 8)
