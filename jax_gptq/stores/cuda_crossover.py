"""From how many rows on the CUDA backend dequantizes the weight once and leaves the product to XLA.

Below these rows the fused kernels read the weight in 4 bits and dequantize it in registers; above
them writing the dequantized weight costs less than the fused kernel loses against XLA's own
product. Measured on an H200 (xla_ffi/docs/h200_notes.md); guessed for other architectures.
"""

import jax

_NEVER = 1 << 31
# Compute capability -> rows of x from which dequantize-then-dot is taken. On 9.0 the wgmma kernel
# is ahead of cuBLAS in bf16 at 4096 rows too.
_ROWS = {"9.0": _NEVER}
# Where rows of x do not begin at multiples of 16 bytes, 9.0 has the mma.sync kernel only.
_ROWS_UNALIGNED = {"9.0": 128}
_DEFAULT_ROWS = 512


def dequantize_from_rows(in_features: int, out_features: int) -> int:
    """Rows of x from which a weight [in_features, out_features] is dequantized first.

    The architecture is that of the first GPU of this process; a host without one, which may be
    lowering for any, takes the default. Weights of less than a million values never pay for the
    second kernel.
    """
    if in_features * out_features < 1 << 20:
        return _NEVER
    rows = _ROWS if in_features % 8 == 0 else _ROWS_UNALIGNED
    return rows.get(_compute_capability(), _DEFAULT_ROWS)


def _compute_capability() -> str:
    device = jax.devices()[0]
    return getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
