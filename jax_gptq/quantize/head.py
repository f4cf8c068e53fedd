"""`round_head`: the output head, which checkpoints leave in 16 bits, in fewer."""

import dataclasses
from typing import TypeVar

from flax import nnx

from jax_gptq.errors import ModelError, QuantizationError
from jax_gptq.linear import GptqLinear
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.layers import Embedding, QuantizedLinear
from jax_gptq.quantize.layer import rtn
from jax_gptq.weight import side_by_side

M = TypeVar("M", bound=CausalLM)

# Rows of the table that are rounded at once: what that needs in f32 is a fraction of the table.
_ROWS = 8192


def round_head(model: M, *, bits: int = 8, group_size: int = 128, layout: str | None = None) -> M:
    """Round a model's output head to nearest, without calibration data.

    Every token reads the whole head: of a small model with a large vocabulary that is more than all
    its 4-bit layers. A tied table stays as it is for the embedding.

    Args:
      model: a loaded model whose head is a float table. It is left as it is.
      bits, group_size: of the head, as of `gptq`; symmetric.
      layout: for `jax_gptq.prepare`; None: for the device of the table.

    Returns:
      A model with a quantized `lm_head`; everything else is shared with `model`.

    Raises:
      ModelError: not a `CausalLM`.
      QuantizationError: the head is quantized already, or holds values that are not finite.
      BitsError, ShapeError: of the options.
    """
    if not isinstance(model, CausalLM):
        raise ModelError(
            f"round_head: expected a jax_gptq.models.CausalLM, found {type(model).__name__}"
        )
    head = model.head
    if not isinstance(head, Embedding):
        raise QuantizationError("lm_head: expected a float table, found a quantized layer")
    table = head.weight[...]
    weight = side_by_side(
        [
            rtn(table[row : row + _ROWS].T, bits=bits, group_size=group_size, name="lm_head")
            for row in range(0, table.shape[0], _ROWS)
        ]
    )
    rounded = nnx.clone(model)
    rounded.config = dataclasses.replace(model.config, tie_embeddings=False)
    linear = GptqLinear.from_weight(weight, layout=layout)
    rounded.lm_head = QuantizedLinear.from_linear(linear)
    return rounded
