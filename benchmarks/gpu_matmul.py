"""One 4-bit linear layer on a GPU, through the public API: this package beside cuBLAS in bf16.

    python benchmarks/gpu_matmul.py [--shapes 4096x4096,...] [--rows 1,2,...] [--seconds 0.02]

Shapes are K x N. Every number is checked first: sampled rows of the result against float64. Then a
jitted chain of products over rotating weights, at least 256 MB of them so that none is left in the
cache, is replayed; XLA records such a chain as CUDA graphs (command buffers). The contenders take
turns, sample by sample; reported is the median time of one product. Group size 128, asymmetric zero
points, x in bfloat16.

Contenders: `ours` with bfloat16 scales (class A for few rows, class B above), `ours f16 scales`,
`dequantize` (class C: the weight is dequantized by a kernel and XLA multiplies), `reference` (the
jnp path) and `cublas` (x @ W with W in bfloat16).

Writes benchmarks/results/gpu_matmul.json and .png. Needs a GPU, and the package built with CUDA.
"""

import argparse
import collections
import dataclasses
import functools
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_gptq
from jax_gptq import ffi
from jax_gptq.reference import dequantize
from jax_gptq.stores.cuda import CudaStore

GROUP = 128
RESULTS = Path(__file__).parent / "results"
SHAPES = "4096x4096,4096x14336,14336x4096,8192x28672,28672x8192"
ROWS = "1,2,4,8,16,32,64,128,256,1024,4096"
# Microseconds on an H200 that this package aims at, by rows (up to) and by weight.
GOALS = {
    16: (3.8, 9.0, 31.5),
    64: (5.5, 12.7, 51.0),
    256: (14.0, 45.0, 179.0),
    4096: (189.0, 662.0, 2650.0),
}
# Below so many rows a chain has `_PRODUCTS` products at least; from there on a sample takes `_LONG`
# seconds, enough to reach the limit of power.
_MANY_ROWS = 128
_PRODUCTS = 512
_LONG = 0.15
GOAL_WEIGHTS = (4096 * 4096, 4096 * 14336, 8192 * 28672)
Chain = Callable[[jax.Array, list, list[jax.Array]], list[jax.Array]]


def random_weight(k: int, n: int, scale_dtype: jnp.dtype) -> jax_gptq.GptqWeight:
    keys = jax.random.split(jax.random.key(k + n), 3)
    return jax_gptq.GptqWeight(
        jax.random.bits(keys[0], (k // 8, n), jnp.uint32),
        jax.random.uniform(keys[1], (k // GROUP, n), jnp.float32, 0.005, 0.015).astype(scale_dtype),
        jax.random.randint(keys[2], (k // GROUP, n), 0, 16).astype(jnp.uint8),
        None,
        4,
        GROUP,
        k,
        n,
    )


def rotating(store: CudaStore, count: int) -> list[CudaStore]:
    """`count` stores with other random codes."""
    keys = jax.random.split(jax.random.key(7), count)
    make = jax.jit(lambda key: jax.random.bits(key, store.codes.shape, jnp.uint32))
    return [dataclasses.replace(store, codes=make(key)) for key in keys]


def chain(product: Callable, rounds: int) -> Chain:
    """`rounds` times one product per weight, each product after the one before.

    A loop on the device, as starting many products takes the host longer than they take. The
    results are written over those of the last run, which are donated: the recorded graphs then find
    their buffers where they were and are launched as they are.
    """

    @functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
    def run(x, weights, results):
        def body(_, carry):
            x, results = carry[0], []
            for weight in weights:
                y = product(x, weight)
                x, y = jax.lax.optimization_barrier((x, y))
                results.append(y)
            # The same x would let XLA take the products out of the loop.
            return x * jnp.asarray(-1, x.dtype), results

        if rounds == 1:
            return body(0, (x, results))[1]
        return jax.lax.fori_loop(0, rounds, body, (x, results))[1]

    return run


def empty_results(product: Callable, x: jax.Array, weights: list) -> list[jax.Array]:
    y = jax.eval_shape(product, x, weights[0])
    return [jnp.zeros(y.shape, y.dtype) for _ in weights]


class Replay:
    """A compiled chain of one contender, run on demand."""

    def __init__(self, product: Callable, x: jax.Array, weights: list):
        self._x, self._weights = x, weights
        self._rounds = -(-_PRODUCTS // len(weights)) if len(x) < _MANY_ROWS else 1
        self._run = chain(product, self._rounds)
        self._results = empty_results(product, x, weights)
        self._time(1)  # compiles
        self._chain_seconds = self._time(1)

    def microseconds(self, seconds: float) -> float:
        """Of one product, over about `seconds`, after half as long that is not counted: until then
        the clocks are those that the contender before left, once the device is at its power limit.
        """
        # Several chains, started one after the other, hide what the host does.
        chains = max(2, int(seconds / self._chain_seconds))
        self._time(chains // 2)
        products = self._rounds * len(self._weights)
        return self._time(chains) / chains * 1e6 / products

    def _time(self, chains: int) -> float:
        start = time.perf_counter()
        for _ in range(chains):
            self._results = self._run(self._x, self._weights, self._results)
        jax.block_until_ready(self._results)
        return time.perf_counter() - start


def medians(replays: dict[str, Replay], seconds: float) -> dict[str, float]:
    """Microseconds of one product of each, from five samples of `seconds` each, taken in turn.

    Every turn has an order of its own: at its limit of power the card favours who ran after whom.
    """
    samples = {name: [] for name in replays}
    order = random.Random(0)
    for _ in range(5):
        for name in order.sample(list(replays), len(replays)):
            samples[name].append(replays[name].microseconds(seconds))
    return {name: round(statistics.median(taken), 2) for name, taken in samples.items()}


def microseconds(product: Callable, x: jax.Array, weights: list, seconds: float) -> float:
    return medians({"": Replay(product, x, weights)}, seconds)[""]


def relative_error(y: jax.Array, x: jax.Array, dense: jax.Array) -> float:
    """Of up to 32 sampled rows, against float64."""
    rows = np.unique(np.linspace(0, len(x) - 1, 32).astype(int))
    with jax.enable_x64(True):
        expected = x[rows].astype(jnp.float64) @ dense.astype(jnp.float64)
        difference = y[rows].astype(jnp.float64) - expected
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def ceilings() -> dict[str, float]:
    """Measured limits of the device: copy bandwidth, and the bf16 product of 8192^3."""
    data = jnp.zeros(1 << 30, jnp.int32)
    gigabytes = 2 * data.nbytes / microseconds(lambda x, _: x + 1, data, [0], 0.2) / 1e3
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)
    tflops = 2 * 8192**3 / microseconds(jnp.matmul, a, [b, b], 0.3) / 1e6
    return {"copy GB/s": round(gigabytes), "bf16 TFLOP/s": round(tflops)}


def graph_events(k: int = 4096, n: int = 4096) -> dict[str, int]:
    """Launches of kernels and CUDA graphs in a profile of three runs of a jitted decode chain."""
    store = jax_gptq.prepare(random_weight(k, n, jnp.bfloat16), layout="cuda")
    x = jax.random.normal(jax.random.key(0), (1, k), jnp.bfloat16)

    def product(x, w):
        return jax_gptq.gptq_matmul(x, w, backend="cuda")

    run, weights = chain(product, 1), rotating(store, 16)
    y = empty_results(product, x, weights)
    for _ in range(3):
        y = run(x, weights, y)
    jax.block_until_ready(y)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                y = run(x, weights, y)
            jax.block_until_ready(y)
        events = collections.Counter()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    events.update(event.name for event in line.events)
    wanted = ("graph", "command", "launchkernel", "decode_kernel")
    return {
        name[:80]: count
        for name, count in events.items()
        if any(word in name.lower() for word in wanted)
    }


def goal(k: int, n: int, rows: int) -> float | None:
    if k * n not in GOAL_WEIGHTS:
        return None
    column = GOAL_WEIGHTS.index(k * n)
    return next((times[column] for upto, times in GOALS.items() if rows <= upto), None)


def measure(k: int, n: int, rows: list[int], seconds: float) -> list[dict]:
    weights = {dtype: random_weight(k, n, dtype) for dtype in (jnp.bfloat16, jnp.float16)}
    stores = {dtype: jax_gptq.prepare(w, layout="cuda") for dtype, w in weights.items()}
    dense = jax.jit(dequantize)(weights[jnp.bfloat16])
    dense16 = jax.jit(dequantize)(weights[jnp.float16])
    count = max(3, -(-(256 << 20) // stores[jnp.bfloat16].codes.nbytes))
    packed = {dtype: rotating(store, count) for dtype, store in stores.items()}
    bf16 = [
        dense.astype(jnp.bfloat16) * f for f in range(1, 1 + max(2, (256 << 20) // (2 * k * n)))
    ]

    def ours(x, store):
        return jax_gptq.gptq_matmul(x, store, backend="cuda")

    def class_c(x, store):
        return store._dequantize_then_dot(x, None, "cuda", x.dtype)

    results = []
    for m in rows:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        contenders = {
            "ours": (ours, packed[jnp.bfloat16], stores[jnp.bfloat16], dense),
            "cublas": (jnp.matmul, bf16, None, None),
        }
        if m in (16, 64, 256, 4096):
            contenders["ours f16 scales"] = (
                ours,
                packed[jnp.float16],
                stores[jnp.float16],
                dense16,
            )
        if m in (256, 1024, 4096):
            contenders["dequantize"] = (
                class_c,
                packed[jnp.bfloat16],
                stores[jnp.bfloat16],
                dense,
            )
        if m in (1, 256, 4096) and k * n <= 4096 * 14336:
            contenders["reference"] = (
                lambda x, w: jax_gptq.gptq_matmul(x, w, backend="reference"),
                [weights[jnp.bfloat16]],
                weights[jnp.bfloat16],
                dense,
            )
        result = {"k": k, "n": n, "rows": m, "goal": goal(k, n, m), "error": {}}
        for name, (product, _, checked, exact) in contenders.items():
            if checked is not None:
                error = relative_error(jax.jit(product)(x, checked), x, exact)
                assert error < 5e-3, f"{name}, {k} x {n}, {m} rows: relative error {error}"
                result["error"][name] = error
        sample = seconds if m < _MANY_ROWS else max(seconds, _LONG)
        result["us"] = medians(
            {
                name: Replay(product, x, rotation)
                for name, (product, rotation, *_) in contenders.items()
            },
            sample,
        )
        results.append(result)
        times = "  ".join(f"{name} {us:.1f}" for name, us in result["us"].items())
        print(
            f"{k:>6} x {n:<6} m {m:<5} goal {result['goal'] or '':<6} {times}"
            f"  error {result['error']['ours']:.1e}",
            flush=True,
        )
    return results


def plot(data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(r["k"], r["n"]) for r in data["results"]}, key=lambda s: (s[0] * s[1], s))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 4), squeeze=False)
    for axis, (k, n) in zip(axes[0], shapes, strict=True):
        rows = [r for r in data["results"] if (r["k"], r["n"]) == (k, n)]
        for name in ("cublas", "ours", "ours f16 scales", "dequantize"):
            points = [(r["rows"], r["us"][name]) for r in rows if name in r["us"]]
            if points:
                axis.loglog(*zip(*points, strict=True), "o-", label=name, markersize=3)
        points = [(r["rows"], r["goal"]) for r in rows if r["goal"]]
        if points:
            axis.loglog(*zip(*points, strict=True), "k:", label="goal")
        axis.set_title(f"K {k}, N {n}")
        axis.set_xlabel("rows of x")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds")
    axes[0][0].legend()
    figure.suptitle(f"{data['device']}, 4-bit weights, group {GROUP}, bf16 activations")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="K x N, by commas")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one sample, below 128 rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_matmul.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu" or not ffi.has("cuda"):
        parser.error("needs a GPU and jax_gptq built with CUDA")
    data = {
        "device": jax.devices()[0].device_kind,
        "driver": driver_version(),
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "ceilings": ceilings(),
        "decode chain of 16 products, three runs, in the profile": graph_events(),
        "results": [],
    }
    print(data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        data["results"] += measure(k, n, [int(m) for m in args.rows.split(",")], args.seconds)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    plot(data, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
