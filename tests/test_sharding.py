"""Tensor parallelism: on eight devices that XLA makes of the host, each case in its own process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from child import run_script
from oracle import random_weight

import jax_gptq
from jax_gptq import errors
from jax_gptq.sharding import column_parallel, row_parallel

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    "case", ["products", "transforms", "integers", "uneven", "mlp", "models", "heads", "gpt2"]
)
def test_on_eight_devices(case):
    script = f"""
        import sharding_cases
        assert len(sharding_cases.jax.devices()) == 8
        sharding_cases.{case}()
    """
    run_script(script, devices=8)


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices("cpu")[:1])


@pytest.fixture
def weight():
    return random_weight(np.random.default_rng(0), 64, 32, group_size=32)[0]


def test_one_device_is_a_mesh_too(weight):
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    expected = jax_gptq.gptq_matmul(x, jax_gptq.prepare(weight))
    for cut in (column_parallel, row_parallel):
        y = jax_gptq.gptq_matmul(x, cut(weight, one_device(), "model"))
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("cut", [column_parallel, row_parallel])
@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(axis="tensor"), errors.ShardingError, "axis: expected one of.*'tensor'"),
        (dict(mesh="model"), errors.ShardingError, r"mesh: expected a jax.sharding.Mesh.*str"),
        (dict(batch_axis="model"), errors.ShardingError, "batch_axis: expected another axis"),
        (dict(batch_axis="rows"), errors.ShardingError, "batch_axis: expected one of.*'rows'"),
        (dict(weight=3), errors.DtypeError, "expected a GptqWeight or a store, found int"),
        (dict(layout="metal"), errors.LayoutError, "metal"),
    ],
)
def test_refusals(weight, cut, change, error, match):
    arguments = dict(weight=weight, mesh=one_device(), axis="model") | change
    with pytest.raises(error, match=match):
        cut(**arguments)


def test_mixed_axis_types_are_refused(weight):
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    mesh = jax.make_mesh(
        (1, 1), ("data", "model"), axis_types=kinds, devices=jax.devices("cpu")[:1]
    )
    with pytest.raises(errors.ShardingError, match="of one type, found Explicit and Auto"):
        column_parallel(weight, mesh, "model", batch_axis="data")


def test_a_sharded_store_has_no_way_back(weight):
    store = column_parallel(weight, one_device(), "model")
    for call in (
        lambda: jax_gptq.prepare(store),
        lambda: row_parallel(store, one_device(), "model"),
        lambda: jax_gptq.prepare(store, "reference"),
    ):
        with pytest.raises(errors.LayoutError, match=r"ShardedStore.*no way back"):
            call()


def test_rows_are_needed():
    with pytest.raises(errors.ShapeError, match="expected rows to cut"):
        row_parallel(jax_gptq.GptqWeight.zeros(0, 8), one_device(), "model")


def test_weights_are_not_cut_inside_jit(weight):
    with pytest.raises(errors.TracingError, match=r"outside jax\.jit"):
        jax.jit(lambda w: column_parallel(w, one_device(), "model"))(weight)


def test_x_is_checked(weight):
    store = column_parallel(weight, one_device(), "model", batch_axis="data")
    with pytest.raises(errors.ShapeError, match=r"expected \[\.\.\., 64\]"):
        jax_gptq.gptq_matmul(jnp.ones((2, 63)), store)
    with pytest.raises(errors.ShapeError, match="first dimension"):
        jax_gptq.gptq_matmul(jnp.ones(64), store)
    with pytest.raises(errors.BackendError, match="x_permuted"):
        jax_gptq.gptq_matmul(jnp.ones((2, 64)), store, x_permuted=True)
    with pytest.raises(errors.BackendError, match='"cuda"'):
        jax_gptq.gptq_matmul(jnp.ones((2, 64)), store, "cuda")


def test_models_that_cannot_be_sharded():
    models = jax_gptq.models
    with pytest.raises(errors.ModelError, match=r"CausalLM, found int"):
        models.shard(3, one_device(), "model")
    model = models.load(models.embedded_path())
    with pytest.raises(errors.ShardingError, match="axis"):
        models.shard(model, one_device(), "tensor")
    models.fuse_projections(model)
    with pytest.raises(errors.ModelError, match="gate_proj is several projections"):
        models.shard(model, one_device(), "model")
