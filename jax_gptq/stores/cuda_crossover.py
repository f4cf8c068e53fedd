"""From how many rows on the CUDA backend dequantizes the weight once and leaves the product to XLA.

Guessed until measured: below these rows the fused kernels read the weight in 4 bits and dequantize
it in registers; above them writing the dequantized weight costs less than the fused kernel loses
against XLA's own product.
"""

import jax

# Compute capability -> rows of x from which dequantize-then-dot is taken.
_ROWS = {"9.0": 1024}
_DEFAULT_ROWS = 512


def dequantize_from_rows(in_features: int, out_features: int) -> int:
    """Rows of x from which a weight [in_features, out_features] is dequantized first.

    The architecture is that of the first GPU of this process; a host without one, which may be
    lowering for any, takes the default. Weights of less than a million values never pay for the
    second kernel.
    """
    if in_features * out_features < 1 << 20:
        return 1 << 31
    return _ROWS.get(_compute_capability(), _DEFAULT_ROWS)


def _compute_capability() -> str:
    device = jax.devices()[0]
    return getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
