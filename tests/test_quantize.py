"""`gptq` on arrays: against plain GPTQ in float64, and what it must refuse or say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gptq
from jax_gptq.errors import BitsError, QuantizationError, ShapeError
from jax_gptq.quantize import Hessian, factoring, gptq, rtn
from jax_gptq.quantize import layer as layer_module
from jax_gptq.quantize.descent import descend
from jax_gptq.quantize.solution import Solution
from jax_gptq.quantize.solver import solve
from jax_gptq.quantize.spec import Spec


def layer(seed: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """W, and H of correlated activations of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * np.arange(1, k + 1) ** -0.6
    x = rng.standard_normal((4 * k, k)) @ mix.T + 0.3 * rng.standard_normal((4 * k, k))
    x *= np.exp(0.7 * rng.standard_normal(k))
    W = rng.standard_normal((k, n)) * 0.02
    return W.astype(np.float32), (2 / len(x) * x.T @ x).astype(np.float32)


def loss(W, quantized, H) -> float:
    error = W.astype(np.float64) - np.asarray(quantized, np.float64)
    return float(np.sum(error * (H.astype(np.float64) @ error)))


def oracle(W, H, *, bits, group_size, sym, order, static=False, damp=0.01) -> np.ndarray:
    """Plain GPTQ, row by row in float64 with the inverse's factor, as the paper writes it."""
    count = len(W)
    group_size = count if group_size == -1 else group_size
    work, H = W[order].astype(np.float64), H[order][:, order].astype(np.float64)
    H = H + np.eye(count) * damp * np.diag(H).mean()
    upper = np.linalg.cholesky(np.linalg.inv(H)).T
    levels = 2**bits - 1

    def grid(group):
        low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
        if sym:
            high = np.maximum(high, -low)
            low = -high
        scale = np.float16((high - low) / levels).astype(np.float64)
        return scale, np.full_like(scale, 2 ** (bits - 1)) if sym else np.round(-low / scale)

    grids = [grid(W[i : i + group_size]) for i in range(0, count, group_size)]
    found = np.zeros_like(work)
    for i in range(count):
        if static:
            scale, zero = grids[order[i] // group_size]
        elif i % group_size == 0:
            scale, zero = grid(work[i : i + group_size])
        code = np.clip(np.round(work[i] / scale) + zero, 0, levels)
        found[i] = scale * (code - zero)
        work[i:] -= upper[i, i:, None] * (work[i] - found[i]) / upper[i, i]
    natural = np.zeros_like(found)
    natural[order] = found
    return natural


@pytest.mark.parametrize(
    ("k", "n", "bits", "group_size", "sym", "desc_act", "static"),
    [
        (256, 40, 4, 128, True, False, False),
        (100, 33, 3, 48, False, True, False),
        (130, 7, 2, 32, True, True, False),
        (70, 20, 8, -1, False, True, False),
        (97, 5, 4, 37, True, False, False),
        (96, 9, 4, 32, False, True, True),
        (33, 1, 4, 128, True, False, False),
        (320, 11, 3, 160, True, False, False),
        (1030, 6, 4, 128, True, False, False),
        (1100, 5, 3, 32, False, True, False),
    ],
)
def test_plain_gptq_is_the_papers(k, n, bits, group_size, sym, desc_act, static):
    W, H = layer(k * n, k, n)
    order = np.argsort(-np.diag(H), kind="stable") if desc_act else np.arange(k)
    rows = k if group_size == -1 or group_size > k else group_size
    expected = oracle(
        W, H, bits=bits, group_size=rows, sym=sym, order=order, static=static or rows == k
    )
    weight, report = gptq(
        W, H, bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, static_groups=static,
        block_size=rows, refine=False,
    )  # fmt: skip
    found = np.asarray(jax_gptq.dequantize(weight))
    # A code at a tie may fall to the other side in f32, and then all that follow may differ.
    assert np.mean(np.abs(found - expected) < 1e-6) > 0.9
    assert loss(W, found, H) == pytest.approx(loss(W, expected, H), rel=0.03)
    assert report.loss == pytest.approx(loss(W, found, H), rel=1e-3)
    assert (weight.g_idx is not None) == (desc_act and not static and rows < k)


def test_lazy_updates_change_nothing_but_group_grids():
    W, H = layer(5, 384, 24)
    losses = [
        gptq(W, H, static_groups=True, block_size=block, refine=False)[1].loss
        for block in (16, 100, 128, 384)
    ]
    assert max(losses) < 1.01 * min(losses)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {}),
        (3, {"desc_act": True}),
        (4, {"desc_act": True, "static_groups": True}),
        (2, {"act_group_aware": True}),
        (8, {"sym": False, "group_size": -1}),
        (2, {"sym": False, "mse": 2.4}),
        (3, {"group_size": 300, "block_size": 64}),
    ],
    ids=str,
)
def test_refinement_lowers_the_loss_and_says_the_truth(bits, options):
    W, H = layer(bits, 330, 21)
    options = {"group_size": 32, **options}
    weight, report = gptq(W, H, bits=bits, **options)
    plain, plain_report = gptq(W, H, bits=bits, refine=False, **options)
    measured = loss(W, jax_gptq.dequantize(weight), H)
    assert report.loss == pytest.approx(measured, rel=1e-4)
    assert report.gptq_loss == pytest.approx(loss(W, jax_gptq.dequantize(plain), H), rel=1e-4)
    assert report.gptq_loss == pytest.approx(plain_report.loss, rel=1e-3)
    assert report.loss < {2: 0.9, 3: 0.95, 4: 0.97, 8: 1.0}[bits] * report.gptq_loss
    error = (W - np.asarray(jax_gptq.dequantize(weight))).astype(np.float64)
    plain_error = (W - np.asarray(jax_gptq.dequantize(plain))).astype(np.float64)
    columns = np.sum(error * (H @ error), 0), np.sum(plain_error * (H @ plain_error), 0)
    assert (columns[0] <= columns[1] * (1 + 1e-4)).all()  # no column gets worse
    assert report.relative_loss == pytest.approx(measured / loss(W, 0 * W, H), rel=1e-3)
    assert weight.scales.dtype == jnp.float16
    assert int(weight.qzeros.max()) < 2**bits
    if options.get("sym", True):
        assert (weight.qzeros == 2 ** (bits - 1)).all()


def test_better_than_rounding_to_nearest():
    W, H = layer(1, 256, 64)
    nearest = loss(W, jax_gptq.dequantize(rtn(W, bits=4, group_size=64)), H)
    weight, report = gptq(W, H, bits=4, group_size=64, refine=False)
    assert report.loss < 0.7 * nearest
    diagonal = np.diag(np.diag(H))  # nothing to spread the error over
    alone, _ = gptq(W, diagonal, bits=4, group_size=64, refine=False)
    np.testing.assert_array_equal(alone.qweight, rtn(W, bits=4, group_size=64).qweight)
    assert (np.asarray(weight.qweight) != np.asarray(alone.qweight)).any()


def test_panels_of_columns_are_independent_and_runs_are_identical():
    W, H = layer(2, 64, 1100)
    whole, _ = gptq(W, H, group_size=32, refine=False)
    again, _ = gptq(W, H, group_size=32, refine=False)
    part, _ = gptq(W[:, 800:], H, group_size=32, refine=False)
    np.testing.assert_array_equal(whole.qweight, again.qweight)
    same = np.asarray(whole.qweight[:, 800:]) == np.asarray(part.qweight)
    assert same.mean() > 0.98  # ties may round otherwise in products of another shape


def test_clip_search_helps_outliers():
    W, _ = layer(3, 128, 30)
    W[::41] *= 12
    eye = np.eye(128, dtype=np.float32)
    plain, searched = (gptq(W, eye, bits=3, mse=mse, refine=False)[1].loss for mse in (0.0, 2.0))
    assert searched < 0.9 * plain


def test_asymmetric_calibration_aims_at_the_float_outputs():
    rng = np.random.default_rng(4)
    wanted = rng.standard_normal((600, 64)).astype(np.float32)
    x = wanted + 0.2 * rng.standard_normal((600, 64)).astype(np.float32)
    W = rng.standard_normal((64, 16)).astype(np.float32)
    H, cross = 2 / 600 * x.T @ x, 2 / 600 * x.T @ (wanted - x)

    def output_error(weight):
        return float(np.sum((wanted @ W - x @ np.asarray(jax_gptq.dequantize(weight))) ** 2))

    plain, _ = gptq(W, H, group_size=32)
    aimed, _ = gptq(W, H, group_size=32, cross=cross)
    half, _ = gptq(W, H, group_size=32, cross=cross, alpha=0.5)
    assert output_error(aimed) < output_error(half) < output_error(plain)


def test_hessian_accumulates():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 50, 12)).astype(np.float32)
    hessian = Hessian(12)
    for batch in x:
        hessian.add(batch)
    flat = x.reshape(-1, 12).astype(np.float64)
    np.testing.assert_allclose(hessian.value, 2 / 150 * flat.T @ flat, rtol=1e-4, atol=1e-5)
    assert (hessian.rows, hessian.non_finite) == (150, 0)
    hessian.add(jnp.full((1, 12), jnp.inf))
    assert hessian.non_finite == 12
    with pytest.raises(ShapeError, match="12"):
        hessian.add(np.zeros((3, 11), np.float32))
    assert not np.asarray(Hessian(3).value).any()


def test_dead_features_singular_and_zero_hessians_are_reported():
    W, H = layer(6, 64, 8)
    H[5] = H[:, 5] = 0
    weight, report = gptq(W, H, group_size=32)
    assert report.dead_rows == 1 and "1 of 64 input features" in report.notes[0]
    assert not np.asarray(jax_gptq.dequantize(weight))[5].any()
    assert np.isfinite(report.loss)

    indefinite = np.eye(64, dtype=np.float32)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    _, report = gptq(W, indefinite, group_size=32)
    assert report.damp > 0.01 and any("singular" in note for note in report.notes)

    rank_one = np.ones((64, 64), np.float32)
    weight, report = gptq(W, rank_one, group_size=32)
    assert np.isfinite(report.loss)
    assert np.isfinite(np.asarray(jax_gptq.dequantize(weight))).all()

    weight, report = gptq(W, 0 * H, group_size=32)
    assert "H is zero" in report.notes[0]
    np.testing.assert_array_equal(weight.qweight, rtn(W, group_size=32).qweight)


@pytest.mark.host  # cuSOLVER has a workspace of nearly a copy
def test_no_step_holds_another_copy_of_the_hessian():
    size, columns = 4096, 32
    spec = Spec(4, 128, True, 0.0, "float16", 128, False)
    H = jax.ShapeDtypeStruct((size, size), jnp.float32)
    W = jax.ShapeDtypeStruct((size, columns), jnp.float32)
    rows = jax.ShapeDtypeStruct((size,), jnp.int32)
    codes = jax.ShapeDtypeStruct((size, columns), jnp.uint8)
    grid = jax.ShapeDtypeStruct((size // 128, columns), jnp.float32)
    for step in (
        layer_module._hessian_facts.lower(H),
        factoring._damped.lower(H, rows, 0.01, size=size),
        factoring._cholesky.lower(H),  # in the place of its argument
        solve.lower(W, H, rows, spec=spec),
        descend.lower(W, H, rows, Solution(codes, grid, grid), spec=spec, sweeps=1),
    ):
        held = step.compile().memory_analysis().temp_size_in_bytes
        assert held < 0.5 * H.size * H.dtype.itemsize


def test_refusals_name_the_layer_and_the_cause():
    W, H = layer(7, 32, 8)
    bad = W.copy()
    bad[3, 3] = np.nan
    asymmetric, infinite, negative = H.copy(), H.copy(), H.copy()
    asymmetric[0, 1] += 0.5 * H.max()
    infinite[2, 2] = np.inf
    negative[1, 1] = -1
    far = np.eye(32, dtype=np.float32)
    far[0, 1] = far[1, 0] = 9
    for error, arguments, options, words in [
        (QuantizationError, (bad, H), {}, "W: expected finite weights, found 1"),
        (QuantizationError, (W, infinite), {}, "H: expected finite"),
        (QuantizationError, (W, asymmetric), {}, "symmetric"),
        (QuantizationError, (W, negative), {}, "diagonal"),
        (QuantizationError, (W, far), {}, "Cholesky"),
        (ShapeError, (W, H[:16, :16]), {}, r"\(32, 32\)"),
        (ShapeError, (W[0], H), {}, "in_features"),
        (ShapeError, (W, H), {"cross": H[:3]}, "cross"),
        (ShapeError, (W, H), {"group_size": 0}, "group_size"),
        (BitsError, (W, H), {"bits": 9}, "bits"),
        (QuantizationError, (W, H), {"desc_act": True, "act_group_aware": True}, "two orders"),
        (QuantizationError, (W, H), {"damp": 1.5}, "damp"),
        (QuantizationError, (W, H), {"mse": -1}, "mse"),
    ]:
        with pytest.raises(error, match=words) as caught:
            gptq(*arguments, name="model.layers.7.mlp", **options)
        assert "model.layers.7.mlp" in str(caught.value)
