"""GPTQ: from float layers and calibration data to quantized ones.

`gptq`, `rtn` and `Hessian` work on arrays; `quantize_model` needs flax and loads on first use.
"""

from typing import Any

from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.hessian import Hessian
from jax_gptq.quantize.layer import gptq, rtn
from jax_gptq.quantize.report import Report

__all__ = ["Hessian", "QuantizeConfig", "Report", "gptq", "quantize_model", "rtn"]


def __getattr__(name: str) -> Any:
    if name != "quantize_model":
        raise AttributeError(f"module 'jax_gptq.quantize' has no attribute {name!r}")
    from jax_gptq.quantize.model import quantize_model

    return quantize_model
