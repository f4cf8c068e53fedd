"""What `test_sharding.py` runs, each function in a process of its own, on eight devices."""

import dataclasses
import functools
import itertools
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import GptqLinear, errors, gptq_matmul
from jax_gptq.models import CausalLM, embedded_path, fuse_projections, generation, load, shard
from jax_gptq.models.config import from_hf
from jax_gptq.models.loading import new_model
from jax_gptq.models.sampling import Sampler
from jax_gptq.sharding import column_parallel, row_parallel

KINDS = (AxisType.Auto, AxisType.Explicit)
CUTS = (column_parallel, row_parallel)


def meshes() -> list[jax.sharding.Mesh]:
    return [jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2) for kind in KINDS]


def any_g_idx(k: int, groups: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, groups, k).astype(np.int32)


# K, N, options of `random_weight`.
WEIGHTS = [
    (256, 192, dict(group_size=64)),
    (352, 130, dict(group_size=128)),  # groups of 8 rows would fit: cut after whole groups
    (344, 64, dict(group_size=128, bits=8)),
    (352 * 4, 64, dict(group_size=128)),  # 2.75 groups a part: groups of 32 rows
    (100, 37, dict(group_size=32, bits=3)),
    (250, 64, dict(group_size=-1, bits=2)),
    (96, 3, dict(group_size=8)),
    (256, 96, dict(group_size=32, g_idx="random")),
    (256, 96, dict(group_size=64, g_idx=any_g_idx(256, 4))),
    (512, 32, dict(group_size=128, g_idx=any_g_idx(512, 4))),
    (250, 70, dict(group_size=64, g_idx=any_g_idx(250, 4))),
]


def products():
    """Every kind of weight and cut against float64, with a bias; the rest is drawn."""
    rng = np.random.default_rng(0)

    def drawn(*choices):
        return choices[rng.integers(len(choices))]

    for (k, n, options), mesh, cut in itertools.product(WEIGHTS, meshes(), CUTS):
        weight, matrix = random_weight(rng, k, n, **options)
        bias = jnp.asarray(rng.standard_normal(n), jnp.float32)
        batch_axis, whole = drawn(None, "data"), drawn(False, True)
        how = {"gather_output": whole} if cut is column_parallel else {"input_is_parallel": whole}
        how |= dict(batch_axis=batch_axis, layout=drawn(None, None, "cuda", "dense"))
        about = (k, n, options, mesh.axis_types, cut.__name__, how)
        try:
            store = cut(weight, mesh, "model", **how)
        except errors.LayoutError:
            # These groups have no tiles.
            assert how["layout"] == "cuda" and (k == 96 or "g_idx" in options), about
            continue
        linear = GptqLinear.from_store(store, bias=bias)
        shape = drawn((4,), (2, 3)) if batch_axis else drawn((4,), (), (2, 3))
        x = rng.standard_normal((*shape, k)).astype(np.float32)
        expected = x.astype(np.float64) @ matrix + np.asarray(bias, np.float64)
        y = drawn(lambda a, x: a(x), jax.jit(lambda a, x: a(x)))(linear, x)
        assert rel_error(y, expected) < 3e-6, (about, shape)


def transforms():
    """vmap, scan, checkpoint, no rows, 16 bits and f32 results, as of one device."""
    rng = np.random.default_rng(6)
    weight, matrix = random_weight(rng, 128, 96, group_size=32, g_idx="random")
    x = rng.standard_normal((4, 6, 128)).astype(np.float32)
    for cut in CUTS:
        product = functools.partial(gptq_matmul, store=cut(weight, meshes()[0], "model"))
        assert rel_error(jax.vmap(product)(x), x @ matrix) < 3e-6
        assert rel_error(jax.lax.map(product, x), x @ matrix) < 3e-6
        assert jax.jit(product)(x[:0]).shape == (0, 6, 96)
        dx = jax.jit(jax.vjp(jax.checkpoint(product), x)[1])(np.ones((4, 6, 96), np.float32))[0]
        assert rel_error(dx, np.broadcast_to(matrix.sum(1), x.shape)) < 3e-6
        half = jnp.asarray(x, jnp.bfloat16)
        exact = np.asarray(half, np.float64) @ matrix
        wide = product(half, preferred_element_type=jnp.float32)
        assert wide.dtype == jnp.float32 and rel_error(wide, exact) < 3e-6
        assert rel_error(product(half), exact) < 4e-3


def uneven():
    """Parts that need tiles of different shapes have no packed layout."""
    weight, matrix = random_weight(
        np.random.default_rng(0), 512, 32, group_size=128, g_idx=any_g_idx(512, 4)
    )
    mesh = meshes()[0]
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    assert rel_error(gptq_matmul(x, row_parallel(weight, mesh, "model")), x @ matrix) < 3e-6
    with pytest.raises(errors.LayoutError, match="4 parts of different shapes"):
        row_parallel(weight, mesh, "model", layout="cpu")


def integers():
    """Small integers are exact, in bf16 too; and equal to what one device computes."""
    weight, matrix = random_weight(
        np.random.default_rng(1), 128, 96, group_size=32, exact=True, sym=True
    )
    x = np.random.default_rng(2).integers(-2, 3, (3, 128)).astype(np.float32)
    for mesh, cut, dtype in itertools.product(meshes(), CUTS, ("float32", "bfloat16")):
        y = gptq_matmul(jnp.asarray(x, dtype), cut(weight, mesh, "model"))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, jnp.asarray(x @ matrix, dtype))


def mlp():
    """Up by columns, down by rows: one sum between devices, no weight moved; and gradients."""
    rng = np.random.default_rng(3)
    up_weight, up_matrix = random_weight(rng, 256, 512, group_size=64)
    down_weight, down_matrix = random_weight(rng, 512, 256, group_size=64)
    x = rng.standard_normal((8, 256)).astype(np.float32)

    def loss(up, down, x):
        return (down(jax.nn.silu(up(x))) ** 2).sum()

    one = (GptqLinear.from_weight(up_weight), GptqLinear.from_weight(down_weight))
    hidden = x.astype(np.float64) @ up_matrix
    expected = (hidden / (1 + np.exp(-hidden))) @ down_matrix
    whole = jax.grad(loss, argnums=(0, 2), allow_int=True)(*one, x)
    scales = jax_gptq.prepare(
        dataclasses.replace(one[0].store, scales=whole[0].store.scales), "reference"
    ).scales
    for mesh in meshes():
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        up, down = (
            GptqLinear.from_store(cut(weight, mesh, "model", batch_axis="data"))
            for cut, weight in ((column_parallel, up_weight), (row_parallel, down_weight))
        )
        with jax.set_mesh(mesh):
            forward = jax.jit(lambda up, down, x: down(jax.nn.silu(up(x))))
            y = forward(up, down, rows)
            assert rel_error(y, expected) < 3e-6
            assert y.sharding.spec[0] == "data", y.sharding
            assert moved(forward.lower(up, down, rows)) == {"all-reduce": 1}
            found = jax.jit(jax.grad(loss, argnums=(0, 2), allow_int=True))(up, down, rows)
        assert rel_error(found[1], whole[1]) < 1e-5
        parts = found[0].store.parts
        local = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[1]), up.store.parts)
        local = dataclasses.replace(local, scales=jnp.asarray(np.asarray(parts.scales)[1]))
        part = jax_gptq.prepare(local, "reference").scales
        assert rel_error(part, scales[:, 128:256]) < 3e-3  # f16


def moved(lowered) -> dict[str, int]:
    """What a compiled program moves between devices: operation -> how often."""
    text = lowered.compile().as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def decode_moves(model: CausalLM, ids: np.ndarray) -> dict[str, int]:
    """By one token of `generate`."""
    leaves, structure = jax.tree.flatten(model)
    sampler, stop = Sampler.make(len(ids), 0.0, None, None, None), jnp.zeros(0, jnp.int32)
    lengths = jnp.full(len(ids), ids.shape[1])
    options = dict(slots=32, dtype=jnp.float32, pad=0)
    progress = generation.prefill(structure, leaves, ids, lengths, sampler, stop, **options)
    until = np.int32(20)
    return moved(generation.decode.lower(structure, leaves, progress, sampler, stop, until, pad=0))


def models():
    """The embedded model (4 heads, 2 of keys and values) over two and four devices."""
    ids = np.random.default_rng(4).integers(0, 2048, (2, 16))
    plain = load(embedded_path(), dtype=jnp.float32)
    logits, tokens = plain(ids), plain.generate(ids, max_new_tokens=12, stop_tokens=())
    blocks = len(plain.blocks)
    sums, gathers = {"all-reduce": 2 * blocks}, {"all-gather": 3 * blocks}
    for devices, batch_axis in ((2, None), (4, None), (4, "data")):
        model = load(embedded_path(), dtype=jnp.float32)
        data = 8 // devices if batch_axis is None else 2
        shard(
            model, jax.make_mesh((data, devices), ("data", "model")), "model", batch_axis=batch_axis
        )
        assert rel_error(model(ids), logits) < 1e-5
        np.testing.assert_array_equal(
            model.generate(ids, max_new_tokens=12, stop_tokens=()), tokens
        )
        if batch_axis is None:
            one = decode_moves(model, ids[:1])
            assert one == (sums if devices == 2 else sums | gathers), (devices, one)
            assert decode_moves(model, ids) == sums | gathers
        assert fuse_projections(model) == 0
    refusals(model, ids)


def refusals(model: CausalLM, ids: np.ndarray):
    """Of a sharded model."""
    with pytest.raises(errors.ModelError, match="cut already"):
        shard(model, meshes()[0], "model")
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(errors.ModelError, match="is sharded"):
            jax_gptq.save_checkpoint(model, f"{folder}/out")
        assert not os.listdir(folder)
    with pytest.raises(errors.ShapeError, match="batch_axis 'data'"):
        model(ids[:1])
    with jax.set_mesh(model.mesh):
        assert model(ids).shape == (2, 16, 2048)
    with jax.set_mesh(meshes()[1]):
        for call in (lambda: model(ids), lambda: model.generate(ids)):
            with pytest.raises(errors.ShardingError, match="cut over"):
                call()


def heads():
    """An output head of 8 bits is cut too."""
    ids = np.random.default_rng(7).integers(0, 2048, (1, 16))
    model = jax_gptq.quantize.round_head(load(embedded_path(), dtype=jnp.float32))
    logits, tokens = model(ids), model.generate(ids, max_new_tokens=6, stop_tokens=())
    shard(model, jax.make_mesh((8,), ("model",)), "model")
    assert rel_error(model(ids), logits) < 1e-5
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=6, stop_tokens=()), tokens)


def gpt2():
    """q, k and v in one layer, whose parts are not heads."""
    config = from_hf(
        dict(model_type="gpt2", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    )
    rngs = jax_gptq.nnx.nnx.Rngs(0)
    model = new_model(config, dtype=jnp.float32, rngs=rngs)
    ids = np.random.default_rng(5).integers(0, 96, (2, 9))
    options = jax_gptq.quantize.QuantizeConfig(bits=4, group_size=32)
    model = jax_gptq.quantize.quantize_model(model, [ids], options)
    logits, tokens = model(ids), model.generate(ids, max_new_tokens=8, stop_tokens=())
    shard(model, jax.make_mesh((4,), ("model",), devices=jax.devices()[:4]), "model")
    assert rel_error(model(ids), logits) < 1e-5
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=8, stop_tokens=()), tokens)
