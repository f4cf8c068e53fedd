"""Float64 NumPy oracle and random weights for the tests: none of the package's maths."""

import dataclasses

import jax
import numpy as np

import jax_gptq


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N] -> int32 [ceil(K*bits/32), N]: the stream, bit by bit."""
    bit = (codes[:, None, :].astype(np.uint32) >> np.arange(bits)[None, :, None]) & 1
    stream = bit.reshape(-1, codes.shape[1])
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0))).reshape(-1, 32, codes.shape[1])
    words = (stream.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return words.astype(np.uint32).view(np.int32)


class RawWeight:
    """Random codes, zeros and scales, with their checkpoint tensors and exact float64 matrix."""

    def __init__(
        self,
        rng: np.random.Generator,
        k: int,
        n: int,
        *,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        g_idx: np.ndarray | str | None = None,
        scale_dtype=np.float16,
        exact: bool = False,
        version: str = "gptq",
    ):
        """`g_idx="random"`: k // group_size in random order. `exact`: power-of-two scales."""
        size = k if group_size == -1 else group_size
        groups = -(-k // size)
        if isinstance(g_idx, str):
            g_idx = rng.permutation(np.arange(k) // size).astype(np.int32)
        if g_idx is not None:
            groups = int(max(g_idx.max() + 1, groups)) if k else groups
        middle = 2 ** (bits - 1)
        self.q = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
        self.z = rng.integers(0, 2**bits, (groups, n)).astype(np.uint8)
        if sym:
            self.z[:] = middle
        scales = (
            2.0 ** rng.integers(-6, -2, (groups, n))
            if exact
            else rng.uniform(0.002, 0.02, (groups, n))
        )
        self.scales = scales.astype(scale_dtype)
        self.g_idx, self.bits, self.group_size = g_idx, bits, group_size
        self.k, self.n, self.version = k, n, version
        stored = self.z if version == "gptq_v2" else (self.z.astype(int) - 1) % 2**bits
        self.qweight = pack_bits(self.q, bits)
        self.qzeros = np.ascontiguousarray(pack_bits(stored.T, bits).T)
        rows = np.arange(k) // size if g_idx is None else g_idx
        centred = self.q.astype(np.float64) - self.z[rows].astype(np.float64)
        self.matrix = self.scales.astype(np.float64)[rows] * centred

    def weight(self) -> jax_gptq.GptqWeight:
        """Through the public constructor."""
        return jax_gptq.GptqWeight.from_raw(
            self.qweight,
            self.scales,
            self.qzeros,
            self.g_idx,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.k,
            out_features=self.n,
            checkpoint_format=self.version,
        )


def random_weight(rng: np.random.Generator, k: int, n: int, **options) -> tuple:
    """(GptqWeight, float64 matrix [k, n]); options as for `RawWeight`."""
    raw = RawWeight(rng, k, n, **options)
    return raw.weight(), raw.matrix


def rel_error(found, expected) -> float:
    """Relative Frobenius error in float64; a NaN never passes a comparison."""
    found = np.asarray(found).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (norm if norm else 1.0))


def assert_same_weight(found, expected):
    """Two `GptqWeight`s are equal in every field: dtypes, bits and static values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for field in dataclasses.fields(jax_gptq.GptqWeight):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, jax.Array):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=field.name)
        else:
            assert a == b, field.name
