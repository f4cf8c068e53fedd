"""Reads GPTQ tensors: `qweight`, `qzeros`, `scales`, `g_idx`; v1, v2 and planar.

qweight int32 [ceil(K * bits / 32), N], packed along K     scales float [G, N]
qzeros  int32 [G, ceil(N * bits / 32)], packed along N     g_idx  int32 [K], optional
"""

import jax.numpy as jnp
import numpy as np

from jax_gptq.checkpoint.config import ModuleConfig
from jax_gptq.checkpoint.files import ModuleTensors
from jax_gptq.checkpoint.planar import PLANES, stream_from_planar
from jax_gptq.errors import BitsError, GroupIndexError, ShapeError
from jax_gptq.packing import pack_codes, packed_rows
from jax_gptq.weight import GptqWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# Any of these alone shows that a module is quantized, so that a missing one is noticed.
MARKERS = ("qweight", "qzeros", "scales")


class ZeroRuleWarning(UserWarning):
    """GPTQModel's and AutoGPTQ's rules read different zero points from the same file."""


def read(tensors: ModuleTensors, config: ModuleConfig) -> GptqWeight:
    """The weight of one module; `from_raw` copies the mapped tensors to the device.

    Raises:
      MissingTensorError, BitsError, ShapeError, DtypeError, GroupIndexError, ScalesError,
      ZeroPointError: naming file and tensor.
    """
    qweight, qzeros = tensors.matrix("qweight"), tensors.matrix("qzeros")
    scales = tensors.matrix("scales")
    g_idx = tensors.get("g_idx") if "g_idx" in tensors else None
    if qweight.shape[1] != scales.shape[1]:
        raise ShapeError(
            f"{tensors.where('qweight')}: expected {scales.shape[1]} columns, as scales has, found "
            f"shape {qweight.shape}; the tensors do not belong together, or {config.source} should "
            f"say quant_method awq"
        )
    bits = _bits(tensors, config)
    k, n = _in_features(tensors, bits), scales.shape[1]
    group_size = _group_size(tensors, config, k)
    if g_idx is None and config.desc_act and scales.shape[0] > 1:
        raise GroupIndexError(
            f"{tensors.prefix}.g_idx: expected int32 ({k},) because {config.source} says "
            f"desc_act, found no such tensor; without it the groups of the rows are unknown, so "
            f"download the checkpoint again or quantize with desc_act false"
        )
    # 5, 6 and 7 bits exist in planar order only.
    planar = bits in PLANES and (bits != 3 or config.checkpoint_format == "gptq_p")
    words, zero_words = qweight, qzeros
    if planar:
        for suffix, features in (("qweight", k), ("qzeros", n)):
            if features % 32:
                raise ShapeError(
                    f"{tensors.where(suffix)}: planar {bits}-bit tensors hold whole blocks of 32 "
                    f"codes, found {features} features; the checkpoint is damaged"
                )
        words = np.asarray(stream_from_planar(qweight.view(np.uint32), bits))
        zero_words = np.asarray(stream_from_planar(qzeros.view(np.uint32).T, bits)).T
    zero_words = _complete_zeros(tensors, zero_words, bits, n, config.sym)
    stores_zero = config.checkpoint_format in ("gptq_v2", "gptq_p")
    if not stores_zero and not config.sym:
        _warn_where_rules_differ(tensors, zero_words, bits, n, config.zero_add)
    return GptqWeight.from_raw(
        words,
        scales,
        zero_words,
        g_idx,
        bits=bits,
        group_size=group_size,
        in_features=k,
        out_features=n,
        checkpoint_format="gptq_v2" if stores_zero else "gptq",
        zero_add=config.zero_add,
        sym=config.sym,
        name=tensors.prefix,
    )


def _lengths(count: int, bits: int) -> set[int]:
    """Packed lengths seen for `count` codes: rounded up, or down by older writers."""
    return {packed_rows(count, bits), count * bits // 32, count // 32 * bits}


def _bits(tensors: ModuleTensors, config: ModuleConfig) -> int:
    """The configured width if the shapes agree with it; the one that they imply if it is open."""
    n, width = tensors.shape("scales")[1], tensors.shape("qzeros")[1]
    implied = [bits for bits in range(2, 9) if width in _lengths(n, bits)]
    if "g_idx" in tensors:
        k, rows = tensors.shape("g_idx")[0], tensors.shape("qweight")[0]
        implied = [bits for bits in implied if rows in _lengths(k, bits)]
    if config.bits in implied:
        return config.bits
    if config.bits is None and len(implied) == 1:
        return implied[0]
    expected = "bits" if config.bits is None else f"bits={config.bits}"
    raise BitsError(
        f"{tensors.where('qweight')}: expected {expected} from {config.source}; found "
        f"{tensors.shape('qweight')} with qzeros {tensors.shape('qzeros')} and scales "
        f"{tensors.shape('scales')}, which fit {implied or 'no'} bits; correct bits in the "
        f"configuration (or the module's rule in `dynamic`)"
    )


def _in_features(tensors: ModuleTensors, bits: int) -> int:
    if "g_idx" in tensors:
        return tensors.shape("g_idx")[0]
    return tensors.shape("qweight")[0] * 32 // bits


def _group_size(tensors: ModuleTensors, config: ModuleConfig, k: int) -> int:
    groups = tensors.shape("scales")[0]
    if config.group_size is None:
        if groups and k % groups == 0:
            return k // groups
    elif groups == (1 if config.group_size == -1 else -(-k // config.group_size)):
        return config.group_size
    elif config.desc_act and "g_idx" in tensors and config.group_size != -1:
        return config.group_size  # g_idx alone decides, and is checked against `groups`.
    raise ShapeError(
        f"{tensors.where('scales')}: expected the groups of group_size={config.group_size} "
        f"({config.source}) over {k} input features, found {groups}; correct group_size in the "
        f"configuration (or the module's rule in `dynamic`)"
    )


def _complete_zeros(
    tensors: ModuleTensors, words: np.ndarray, bits: int, n: int, sym: bool
) -> np.ndarray:
    """Older writers drop the last columns' zero points: known under `sym`, else lost."""
    missing = packed_rows(n, bits) - words.shape[1]
    if missing <= 0:
        return words
    if not sym or words.shape[1] == 0:
        raise ShapeError(
            f"{tensors.where('qzeros')}: expected {packed_rows(n, bits)} words for {n} columns, "
            f"found {words.shape[1]}: an old writer rounded the length down, and the zero points "
            f"of the last columns are lost unless sym is true; quantize the model again"
        )
    constant = np.full((n, 1), words.view(np.uint32)[0, 0] & (2**bits - 1), np.uint8)
    full = np.asarray(pack_codes(jnp.asarray(constant), bits)).T
    tail = np.repeat(full[:, words.shape[1] :], words.shape[0], axis=0)
    return np.concatenate([words.view(np.uint32), tail], axis=1)


def _warn_where_rules_differ(
    tensors: ModuleTensors, words: np.ndarray, bits: int, n: int, rule: str
) -> None:
    """Adding one to each field, or 0x11... to the word: they differ if a field carries."""
    if 32 % bits:
        return
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = np.uint32(2**bits - 1)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    fields = unsigned[:, :, None] >> shifts & mask
    by_word = (unsigned + np.uint32((1 << shifts).sum()))[:, :, None] >> shifts & mask
    differ = ((fields + 1 & mask) != by_word).reshape(len(words), -1)[:, :n].sum()
    if differ:
        tensors.files.warn_once(
            f"{tensors.where('qzeros')}: {differ} zero points depend on who wrote the file (a true "
            f"zero point of 0 in checkpoint_format gptq); read by the rule {rule!r}, because "
            f"meta.quantizer {'names' if rule == 'word' else 'does not name'} gptqmodel; "
            f"further modules of this checkpoint may hold such zero points too",
            ZeroRuleWarning,
        )
