"""GPTQModel's solver on a W and H of ours."""

import os

import numpy as np

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def gptqmodel(
    W: np.ndarray,
    H: np.ndarray,
    *,
    bits: int,
    group_size: int,
    sym: bool = True,
    desc_act: bool = False,
    act_group_aware: bool = False,
    static_groups: bool = False,
    damp: float = 0.01,
    mse: float = 0.0,
) -> tuple[np.ndarray, float]:
    """Dequantized W [K, N], as its solver leaves it (f32 scales), and the seconds that it took."""
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = torch.nn.Linear(*W.shape, bias=False)
    layer.weight.data = torch.from_numpy(np.ascontiguousarray(W.T))
    solver = GPTQ(
        layer,
        QuantizeConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=desc_act,
            act_group_aware=act_group_aware,
            static_groups=static_groups,
            damp_percent=damp,
            damp_auto_increment=0.01,
            mse=mse,
        ),
    )
    solver.fallback = None  # H is given: its solver must not count the rows behind it
    solver.quantizer.configure(perchannel=True)
    solver.nsamples = solver.fwd_counter = 1
    hessian = torch.from_numpy(np.array(H, np.float32))

    def finalize_hessian(target_device=None):
        solver.H = hessian
        return hessian

    solver.finalize_hessian = finalize_hessian
    quantized, *_, seconds, _, damp_used, _ = solver.quantize()
    assert damp_used == damp
    return quantized.numpy().T, float(seconds)
