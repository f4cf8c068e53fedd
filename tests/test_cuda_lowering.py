"""On a host without a GPU, and without the compiled module, every CUDA kernel still lowers."""

import re
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import ffi
from jax_gptq.linear import GptqLinear
from jax_gptq.models.layers import QuantizedLinear, head_logits
from jax_gptq.stores.cuda import WORKSPACE_BYTES
from jax_gptq.stores.cuda_crossover import dequantize_from_rows

# Class -> shape [m, k, n]. The handler tells decode and the pipelines apart by the buffer's m.
CLASSES = {
    "decode": (4, 256, 130),
    "pipeline": (100, 256, 130),
    "dequantize": (dequantize_from_rows(1088, 1024), 1088, 1024),
}


def setup(k, n, **options):
    rng = np.random.default_rng(k)
    weight, matrix = random_weight(rng, k, n, **({"group_size": 64} | options))
    return jax_gptq.prepare(weight, "cuda"), matrix


def lowered(store, x, bias=None, backend="cuda", platforms=("cuda",)):
    function = jax.jit(lambda x, s, b: jax_gptq.gptq_matmul(x, s, backend, bias=b))
    return function.trace(x, store, bias).lower(lowering_platforms=platforms).as_text()


def calls(text):
    """(target, operand types, result types, attributes) of every FFI call of this package."""
    pattern = r"custom_call @(jax_gptq[\w.]+)\(.*?backend_config = \{(.*?)\}.* : \((.*)\) -> (.*)"
    return [
        (
            target,
            re.findall(r"tensor<(.*?)>", operands),
            re.findall(r"tensor<(.*?)>", results),
            config,
        )
        for target, config, operands, results in re.findall(pattern, text)
    ]


@pytest.mark.parametrize("backend", ["cuda", None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("kernel", CLASSES)
def test_custom_calls(kernel, dtype, bits, backend, monkeypatch):
    m, k, n = CLASSES[kernel]
    store, _ = setup(k, n, bits=bits, scale_dtype=np.float32)
    # With backend=None the call is there where the module was built; pretend that it was.
    monkeypatch.setattr(ffi, "has", lambda module: True)
    x = jax.ShapeDtypeStruct((m, k), {"bf16": jnp.bfloat16, "f16": jnp.float16}[dtype])
    tiles, steps, groups = -(-n // 64), k // 64 * bits // 4, k // 64
    weight = [
        f"{tiles}x{steps}x4x32x4xui32",
        f"{tiles}x{groups}x64xf32",
        f"{tiles}x{groups}x64xui8",
    ]
    [(target, operands, results, config)] = calls(lowered(store, x, jnp.zeros(n), backend))
    assert "group_size = 64 : i32" in config and f"bits = {bits} : i32" in config
    if kernel == "dequantize":
        assert target == "jax_gptq.cuda.dequantize.v1"
        assert operands == weight and results == [f"{n}x{k}x{dtype}"]
    else:
        assert target == "jax_gptq.cuda.matmul.v1"
        assert operands == [f"{m}x{k}x{dtype}", *weight, f"{n}xf32"]
        assert results == [f"{m}x{n}x{dtype}", f"{WORKSPACE_BYTES}xui8"]


def test_a_quantized_head_runs_as_a_kernel_with_float32_results(monkeypatch):
    monkeypatch.setattr(ffi, "has", lambda module: True)
    head = QuantizedLinear.from_linear(GptqLinear(setup(128, 192)[0]))
    config = types.SimpleNamespace(logits_softcap=None)
    logits = jax.jit(lambda x: head_logits(config, head, x))
    traced = logits.trace(jax.ShapeDtypeStruct((2, 128), jnp.bfloat16))
    [(target, operands, results, _)] = calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert target == "jax_gptq.cuda.matmul.v1" and operands[0] == "2x128xbf16"
    assert results[0] == "2x192xf32"


def test_no_bias_is_an_empty_operand():
    store, _ = setup(128, 64)
    x = jnp.zeros((3, 128), jnp.bfloat16)
    [(_, operands, _, _)] = calls(lowered(store, x))
    assert operands[-1] == "0xf32"


def test_act_order_gathers_x_once():
    store, _ = setup(128, 64, g_idx="random")
    x = jnp.zeros((3, 128), jnp.bfloat16)
    assert "gather" in lowered(store, x)
    permuted = jax.jit(lambda x, s: jax_gptq.gptq_matmul(x, s, "cuda", x_permuted=True))
    text = permuted.trace(x, store).lower(lowering_platforms=("cuda",)).as_text()
    assert "gather" not in text and len(calls(text)) == 1


def test_a_named_backend_is_emitted_without_the_module(monkeypatch):
    monkeypatch.setattr(ffi, "has", lambda module: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # on a GPU it is refused
    store, _ = setup(128, 64)
    x = jnp.zeros((3, 128), jnp.float16)
    [(target, *_)] = calls(lowered(store, x))
    assert target == "jax_gptq.cuda.matmul.v1"
    assert not calls(lowered(store, x, backend=None))


@pytest.mark.host
def test_cuda_on_a_cpu_is_an_error_not_a_fallback():
    store, _ = setup(128, 64)
    x = jnp.zeros((3, 128), jnp.float16)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"jax_gptq\.cuda\.matmul"):
        jax_gptq.gptq_matmul(x, store, "cuda").block_until_ready()


@pytest.mark.parametrize("symbolic", [False, True])
def test_one_export_for_cpu_and_cuda_runs_on_the_cpu(symbolic, monkeypatch):
    store, matrix = setup(192, 100, g_idx="random")
    monkeypatch.setattr(ffi, "has", lambda module: True)
    rows = jax.export.symbolic_shape("rows")[0] if symbolic else 5
    exported = jax.export.export(
        jax.jit(lambda x, store: jax_gptq.gptq_matmul(x, store)),
        platforms=["cpu", "cuda"],
        disabled_checks=jax_gptq.EXPORT_DISABLED_CHECKS,
    )(jax.ShapeDtypeStruct((rows, 192), jnp.bfloat16), store)
    assert "jax_gptq.cuda.matmul.v1" in exported.mlir_module()
    x = np.random.default_rng(1).standard_normal((5, 192)).astype(jnp.bfloat16)
    y = jax.export.deserialize(exported.serialize()).call(x, store)
    assert y.dtype == jnp.bfloat16
    assert rel_error(y, x.astype(np.float64) @ matrix) < 2e-3
