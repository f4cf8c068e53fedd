"""GPTQ: from float layers and calibration data to quantized ones.

`gptq`, `rtn` and `Hessian` work on arrays; `quantize_model` (the decoders of `jax_gptq.models` and
any NNX module), `quantize_linen` and `round_head` need flax and load on first use.
"""

from typing import Any

from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.hessian import Hessian
from jax_gptq.quantize.layer import gptq, rtn
from jax_gptq.quantize.report import Report

__all__ = [
    "Hessian",
    "QuantizeConfig",
    "Report",
    "gptq",
    "quantize_linen",
    "quantize_model",
    "round_head",
    "rtn",
]


def __getattr__(name: str) -> Any:
    if name == "quantize_model":
        from jax_gptq.quantize.model import quantize_model

        return quantize_model
    if name == "quantize_linen":
        from jax_gptq.quantize.linen import quantize_linen

        return quantize_linen
    if name == "round_head":
        from jax_gptq.quantize.head import round_head

        return round_head
    raise AttributeError(f"module 'jax_gptq.quantize' has no attribute {name!r}")
