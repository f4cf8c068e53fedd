"""GPTQ: from float layers and calibration data to quantized ones."""

from jax_gptq.quantize.layer import gptq
from jax_gptq.quantize.report import Report

__all__ = ["Report", "gptq"]
