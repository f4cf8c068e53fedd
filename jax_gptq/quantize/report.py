"""What a solve has to say about itself."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Report:
    """How well a layer was quantized.

    Attributes:
      loss: tr((W - Wq)^T H (W - Wq)), with the stored scales.
      relative_loss: loss / tr(W^T H W), measured on up to 256 evenly spaced columns.
      gptq_loss: the loss of plain GPTQ, before refinement.
      damp: fraction of the mean diagonal that was added to factor H.
      dead_rows: input features that were zero in all of the calibration data.
      notes: fallbacks taken, in words; empty where all went as asked.
    """

    loss: float
    relative_loss: float
    gptq_loss: float
    damp: float
    dead_rows: int
    notes: tuple[str, ...] = ()
