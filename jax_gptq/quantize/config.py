"""Options of a whole model's quantization."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How `quantize_model` quantizes each layer: arguments of `gptq`, and

    Attributes:
      asymmetric: calibrate against the float model's activations (GPTAQ): costs a second forward
        pass and takes `alpha` of the shift.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    act_group_aware: bool = False
    damp: float = 0.01
    damp_step: float = 0.01
    mse: float = 0.0
    block_size: int = 128
    refine: bool = True
    asymmetric: bool = False
    alpha: float = 1.0

    def layer_options(self) -> dict:
        """Keyword arguments of `gptq`."""
        options = dataclasses.asdict(self)
        del options["asymmetric"]
        return options
