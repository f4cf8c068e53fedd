"""One suite for the op: every backend of this machine, every transform, against float64."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from child import run_script
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import errors
from jax_gptq.stores import PACKED_LAYOUTS

# A packed layout runs everywhere: through its kernel where that is built, else unpacked by jnp.
LAYOUTS = ["reference", "dense", *PACKED_LAYOUTS]
NOT_DENSE = [name for name in LAYOUTS if name != "dense"]
BOUND = {"float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}


def setup(layout, k=128, n=64, seed=0, lead=(5,), dtype=np.float32, **options):
    rng = np.random.default_rng(seed)
    weight, matrix = random_weight(rng, k, n, **({"group_size": 32} | options))
    x = jnp.asarray(rng.standard_normal((*lead, k)), dtype)
    return jax_gptq.prepare(weight, layout), matrix, x


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,), (2, 0, 3)])
def test_leading_dimensions_and_dtypes(layout, dtype, lead):
    store, w, x = setup(layout, lead=lead, dtype=dtype)
    y = jax_gptq.gptq_matmul(x, store)
    assert y.dtype == dtype and y.shape == (*lead, 64)
    assert rel_error(y, np.asarray(x, np.float64) @ w) < BOUND[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"g_idx": "random"}, {"sym": True}, {"group_size": -1}])
def test_formats(layout, bits, options):
    store, w, x = setup(layout, 192, 96, bits=bits, seed=bits, **options)
    assert rel_error(jax.jit(jax_gptq.gptq_matmul)(x, store), np.asarray(x, float) @ w) < 3e-6


@pytest.mark.parametrize("dtype", BOUND)
def test_integers_are_exact(layout, dtype):
    store, w, _ = setup(layout, 64, 48, exact=True, sym=True)
    x = np.random.default_rng(1).integers(-2, 3, (3, 64)).astype(np.float32)
    exact = np.asarray(jnp.asarray(x @ w, dtype).astype(jnp.float32))
    y = jax_gptq.gptq_matmul(jnp.asarray(x, dtype), store)
    np.testing.assert_array_equal(np.asarray(y.astype(jnp.float32)), exact)


def test_bias_is_added_before_the_rounding(layout):
    store, w, x = setup(layout, dtype=jnp.bfloat16)
    bias = np.random.default_rng(2).standard_normal(64).astype(np.float32) * 10
    y = jax_gptq.gptq_matmul(x, store, bias=bias)
    exact = np.asarray(x, np.float64) @ w + bias
    assert rel_error(y, exact) < 2.5e-3  # one rounding: half of 2^-8 at most


@pytest.mark.parametrize("dtype", BOUND)
def test_float32_results(layout, dtype):
    store, w, x = setup(layout, lead=(2, 3), dtype=dtype)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal(64), jnp.float32)

    def sums(x):
        return jax_gptq.gptq_matmul(x, store, bias=bias, preferred_element_type=jnp.float32)

    exact = np.asarray(x, np.float64) @ w + np.asarray(bias)
    for y in (sums(x), jax.jit(jax.vmap(sums))(x)):
        assert y.dtype == jnp.float32
        assert rel_error(y, exact) < BOUND["float32"]
    dx = jax.grad(lambda x: (sums(x) ** 2).sum())(x)
    assert dx.dtype == dtype
    assert rel_error(dx, 2 * exact @ w.T) < BOUND[dtype]


def test_same_bits_again(layout):
    store, _, x = setup(layout, 256, 130, lead=(9,))
    f = jax.jit(jax_gptq.gptq_matmul)
    first = np.asarray(f(x, store))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(f(x, store)), first)


def test_vmap(layout):
    store, w, x = setup(layout, lead=(4, 3, 5))
    other, w2, _ = setup(layout, seed=1)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), store, other, store, other)
    ws = np.stack([w, w2, w, w2])
    xf = np.asarray(x, np.float64)
    f = jax_gptq.gptq_matmul
    assert rel_error(jax.vmap(lambda x: f(x, store))(x), xf @ w) < 3e-6
    assert rel_error(jax.vmap(lambda x: f(x, store), in_axes=1, out_axes=1)(x), xf @ w) < 3e-6
    assert rel_error(jax.vmap(jax.vmap(lambda x: f(x, store)))(x), xf @ w) < 3e-6
    assert rel_error(jax.vmap(f, in_axes=(None, 0))(x[0], stacked), xf[0] @ ws[:, None]) < 3e-6
    assert rel_error(jax.vmap(f)(x, stacked), xf @ ws[:, None]) < 3e-6
    nested = jax.vmap(jax.vmap(f, in_axes=(0, None)), in_axes=(0, 0))
    assert rel_error(nested(x, stacked), xf @ ws[:, None]) < 3e-6
    bias = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    with_bias = jax.vmap(lambda x, b: f(x, store, bias=b))(x, bias)
    assert rel_error(with_bias, xf @ w + bias[:, None, None]) < 3e-6


def test_vmap_over_x_makes_one_call(layout):
    """The batch is folded into the rows: no loop, and no copy of the weight per element."""
    store, _, x = setup(layout, lead=(4, 3))
    jaxpr = str(jax.make_jaxpr(jax.vmap(lambda x: jax_gptq.gptq_matmul(x, store)))(x))
    assert "scan" not in jaxpr and "while" not in jaxpr
    text = jax.jit(jax.vmap(jax_gptq.gptq_matmul, in_axes=(0, None))).lower(x, store).as_text()
    assert text.count("stablehlo.custom_call @jax_gptq") <= 1 and "while" not in text


def test_gradients(layout):
    store, w, x = setup(layout, lead=(2, 3))
    bias = jnp.asarray(np.random.default_rng(5).standard_normal(64), jnp.float32)
    dy = np.random.default_rng(6).standard_normal((2, 3, 64)).astype(np.float32)

    def loss(x, bias):
        return (jax_gptq.gptq_matmul(x, store, bias=bias) * dy).sum()

    value, (dx, dbias) = jax.value_and_grad(loss, argnums=(0, 1))(x, bias)
    xf = np.asarray(x, np.float64)
    assert rel_error(value, ((xf @ w + np.asarray(bias)) * dy).sum()) < 1e-5
    assert rel_error(dx, dy @ w.T) < 3e-6
    assert rel_error(dbias, dy.sum((0, 1))) < 3e-6
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(x, bias)
    assert rel_error(again, dy @ w.T) < 3e-6
    batched = jax.vmap(jax.grad(lambda x: jax_gptq.gptq_matmul(x, store).sum()))(x)
    assert rel_error(batched, np.broadcast_to(w.sum(1), x.shape)) < 3e-6


def test_second_derivative(layout):
    store, w, x = setup(layout, 32, 16, lead=())
    hessian = jax.jacrev(jax.grad(lambda x: (jax_gptq.gptq_matmul(x, store) ** 2).sum()))(x)
    assert rel_error(hessian, 2 * w @ w.T) < 3e-6


def test_with_64_bit_types_enabled(layout):
    store, w, x = setup(layout, g_idx="random")
    with jax.enable_x64(True):
        dx = jax.grad(lambda x: jax_gptq.gptq_matmul(x, store).sum())(x)
        normal = store if layout == "dense" else jax_gptq.prepare(store, "reference")
        assert rel_error(jax_gptq.gptq_matmul(x, normal), np.asarray(x, np.float64) @ w) < 3e-6
    assert dx.dtype == np.float32
    assert rel_error(dx, np.broadcast_to(w.sum(1), x.shape)) < 3e-6


@pytest.mark.parametrize("layout", NOT_DENSE)
def test_gradient_of_the_scales(layout):
    store, _, x = setup(layout, g_idx="random", scale_dtype=np.float32)
    names = [f.name for f in dataclasses.fields(store) if f.name == "scales"]
    assert names, "every packed store keeps its scales under that name"
    dy = np.random.default_rng(6).standard_normal((5, 64)).astype(np.float32)

    def loss(scales, at):
        y = jax_gptq.gptq_matmul(x, dataclasses.replace(at, scales=scales))
        return (y * dy).sum()

    reference = jax_gptq.prepare(store, "reference")
    expected = jax.grad(
        lambda s: (x @ jax_gptq.dequantize(dataclasses.replace(reference, scales=s)) * dy).sum()
    )(reference.scales)
    found = jax.jit(jax.grad(loss))(store.scales, store)
    back = jax_gptq.prepare(dataclasses.replace(store, scales=found), "reference").scales
    assert rel_error(back, expected) < 3e-6


def test_frozen_scales_cost_no_matrix(layout):
    """Without a gradient of the scales, the backward pass computes no [K, N] product."""
    store, _, x = setup(layout, lead=(5,))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jax_gptq.gptq_matmul(x, store).sum()))(x)
    assert "dot_general" in str(jaxpr)
    compiled = jax.jit(jax.grad(lambda x, s: jax_gptq.gptq_matmul(x, s).sum())).lower(x, store)
    dots = [line for line in compiled.compile().as_text().splitlines() if " dot(" in line]
    assert not any("f32[128,64]{1,0} dot" in line for line in dots), dots


@pytest.mark.parametrize("layout", NOT_DENSE)
def test_gradients_of_x_and_of_the_weight_in_turn(layout):
    """The backward pass keeps other things for each; JAX traces the product once for both."""
    store, w, x = setup(layout)

    def of_x():
        return jax.jit(jax.grad(lambda x: jax_gptq.gptq_matmul(x, store).sum()))(x)

    def of_store():
        loss = jax.grad(lambda s: jax_gptq.gptq_matmul(x, s).sum(), allow_int=True)
        return jax.jit(loss)(store)

    first, scales = of_x(), of_store().scales
    assert rel_error(of_x(), np.broadcast_to(w.sum(1), x.shape)) < 3e-6
    np.testing.assert_array_equal(of_x(), first)
    np.testing.assert_array_equal(of_store().scales, scales)
    assert np.asarray(scales, np.float32).any()


def test_jvp_says_that_it_does_not(layout):
    store, _, x = setup(layout)
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: jax_gptq.gptq_matmul(x, store), (x,), (x,))


def test_scan_over_stacked_layers(layout):
    stores = [setup(layout, 64, 64, seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(s for s, _, _ in stores))
    x = stores[0][2]
    y, _ = jax.lax.scan(lambda c, s: (jax_gptq.gptq_matmul(c, s), None), x, stacked)
    expected = np.asarray(x, np.float64)
    for _, w, _ in stores:
        expected = expected @ w
    assert rel_error(y, expected) < 1e-5


def test_export_round_trip(layout):
    """Serialized, for two platforms, with symbolic leading dimensions."""
    store, w, x = setup(layout, lead=(4, 2))
    lin = jax_gptq.GptqLinear.from_store(store, bias=np.ones(64, np.float32))
    a, b = jax.export.symbolic_shape("a, b")
    exported = jax.export.export(
        jax.jit(lambda lin, x: lin(x)),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_gptq.EXPORT_DISABLED_CHECKS,
    )(lin, jax.ShapeDtypeStruct((a, b, 128), jnp.float32))
    loaded = jax.export.deserialize(exported.serialize())
    for rows in (x, x[:1], x[:, :1]):
        assert rel_error(loaded.call(lin, rows), np.asarray(rows, np.float64) @ w + 1) < 3e-6


@pytest.mark.parametrize("layout", NOT_DENSE)
def test_packed_weight_is_an_argument_never_an_f32_constant(layout):
    store, _, x = setup(layout, 512, 256, lead=(1,))
    text = jax.jit(jax_gptq.gptq_matmul).lower(x, store).compile().as_text()
    assert "f32[512,256]{1,0} constant" not in text and "f32[512,256] constant" not in text


@pytest.mark.parametrize("packed", PACKED_LAYOUTS)
def test_packed_layouts_stay_packed(packed):
    """A loaded 4-bit layer takes the bytes of its codes and scales, not those of a dense matrix."""
    weight, _ = random_weight(np.random.default_rng(0), 1024, 512)
    store = jax_gptq.prepare(weight, packed)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(store))
    assert 1024 * 512 / 2 <= size < 1024 * 512 / 2 * 1.15


def test_shard_map_over_two_devices(layout):
    """Rows of x, columns of W, and rows of W with a psum; forward and backward."""
    script = f"""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from test_matmul import setup, rel_error
        from jax_gptq import gptq_matmul
        store, w, x = setup({layout!r}, 128, 128, lead=(6,))
        xf = np.asarray(x, np.float64)
        mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.set_mesh(mesh):
            rows = jax.jit(jax.shard_map(gptq_matmul, in_specs=(P("t"), P()), out_specs=P("t")))
            assert rel_error(rows(x, store), xf @ w) < 3e-6
            grad = jax.jit(jax.grad(lambda x: rows(x, store).sum()))(x)
            assert rel_error(grad, np.broadcast_to(w.sum(1), x.shape)) < 3e-6
    """
    run_script(script, devices=2)


@pytest.mark.parametrize(
    "x, error, match",
    [
        (np.ones((2, 127), np.float32), errors.ShapeError, r"x: expected \[\.\.\., 128\]"),
        (np.ones((2, 128), np.int32), errors.DtypeError, "x: expected one of.*int32"),
        (np.float32(1), errors.ShapeError, "x: expected"),
    ],
)
def test_wrong_activations(layout, x, error, match):
    store, _, _ = setup(layout)
    with pytest.raises(error, match=match):
        jax_gptq.gptq_matmul(x, store)


def test_wrong_arguments():
    store, _, x = setup("reference")
    f = jax_gptq.gptq_matmul
    with pytest.raises(errors.ShapeError, match=r"bias: expected shape \(64,\)"):
        f(x, store, bias=np.ones(63, np.float32))
    with pytest.raises(errors.DtypeError, match="bias: expected a float"):
        f(x, store, bias=np.ones(64, int))
    with pytest.raises(errors.DtypeError, match="preferred_element_type: expected float32"):
        f(x, store, preferred_element_type=jnp.bfloat16)
    with pytest.raises(errors.DtypeError, match="store: expected a GptqWeight"):
        f(x, np.ones((128, 64)))
    with pytest.raises(errors.BackendError, match=r"metal.*unsupported.*reference"):
        f(x, store, "metal")
    with pytest.raises(errors.BackendError, match="triton"):
        f(x, store, "triton")
    with pytest.raises(errors.BackendError, match="int4"):
        f(x, store, activations="int4")
    with pytest.raises(errors.BackendError, match="x_permuted"):
        f(x, store, x_permuted=True)
    for name in [name for cls in PACKED_LAYOUTS.values() for name in cls.backends]:
        with pytest.raises(errors.BackendError, match="prepare"):
            f(x, store, name)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_x_permuted(layout):
    store, w, x = setup(layout, g_idx="random")
    y = jax_gptq.gptq_matmul(x[:, store.perm], store, x_permuted=True)
    assert rel_error(y, np.asarray(x, np.float64) @ w) < 3e-6
    assert (
        rel_error(
            jax.grad(lambda x: jax_gptq.gptq_matmul(x, store, x_permuted=True).sum())(x),
            np.broadcast_to(w.sum(1)[np.asarray(store.perm)], x.shape),
        )
        < 3e-6
    )
