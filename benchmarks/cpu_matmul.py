"""One 4-bit linear layer on the host: this kernel beside dense JAX and whichever peers are there.

    python benchmarks/cpu_matmul.py [--rounds 15] [--shapes 4096x4096,...] [--rows 1,4,...]
    taskset -c 0 python benchmarks/cpu_matmul.py --clock cpu    # where other work runs, too

All contenders are timed in one process, a few calls each, in turn, round after round, so that
whatever else the machine does hits all of them; what is reported is the median over the rounds of
each contender's time, and of its ratio to this kernel in the same round. Every product reads
another copy of the weights, out of more memory than the cache holds. What runs in JAX runs as it
does in a model, several products in one jitted graph (`--products 1`: each a call of its own, which
on several cores waits for threads to wake up). Group size 128, symmetric.

Peers, where installed: onnxruntime (MatMulNBits, accuracy levels 1 and 4), openvino (u4 weights,
f32 or dynamically quantized activations), torch (dense bf16, int4pack).

Writes benchmarks/results/cpu_matmul.json and .png.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_gptq
from jax_gptq import ffi

GROUP = 128
RESULTS = Path(__file__).parent / "results"
OURS = {"float32": "jax_gptq f32", "bfloat16": "jax_gptq bf16", "int8": "jax_gptq int8"}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# The CPU time of all threads leaves out what other processes take, but counts spinning threads.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A contender makes, from x, call(number of the weights' copy), which waits for the result.
Call = Callable[[int], np.ndarray | None]


class Layer:
    """Random codes [K, N] and scales [G, N] f16; the zero point is 8."""

    def __init__(self, k: int, n: int):
        rng = np.random.default_rng(0)
        self.k, self.n = k, n
        self.codes = rng.integers(0, 16, (k, n), dtype=np.uint8)
        self.scales = rng.uniform(0.002, 0.02, (k // GROUP, n)).astype(np.float16)
        self.packed_bytes = k * n // 2 + self.scales.nbytes

    def dense(self) -> np.ndarray:
        scales = np.repeat(self.scales.astype(np.float32), GROUP, axis=0)
        return scales * (self.codes.astype(np.float32) - 8)

    def weight(self) -> jax_gptq.GptqWeight:
        groups = self.k // GROUP
        words = np.zeros((self.k // 8, self.n), np.uint32)
        for i in range(8):
            words |= self.codes[i::8].astype(np.uint32) << np.uint32(4 * i)
        zeros = np.full((groups, self.n // 8), 0x88888888, np.uint32)
        return jax_gptq.GptqWeight.from_raw(
            words, self.scales, zeros, bits=4, group_size=GROUP, checkpoint_format="gptq_v2"
        )


def copies(bytes_each: int) -> int:
    """How many copies to rotate through: well above any cache."""
    return max(2, math.ceil(128e6 / bytes_each))


def ours(layer: Layer, products: int) -> dict[str, Callable[[np.ndarray], Call]]:
    weight = layer.weight()
    stores = [jax_gptq.prepare(weight, layout="cpu") for _ in range(copies(layer.packed_bytes))]
    exact = chain(jax_gptq.gptq_matmul)
    int8 = chain(lambda x, s: jax_gptq.gptq_matmul(x, s, activations="int8"))
    return {
        OURS["float32"]: rotating(exact, jnp.float32, stores, products),
        OURS["bfloat16"]: rotating(exact, jnp.bfloat16, stores, products),
        OURS["int8"]: rotating(int8, jnp.float32, stores, products),
    }


def chain(product: Callable) -> Callable:
    """A jitted graph of products of x with some weights, each after the one before."""

    @jax.jit
    def run(x, weights):
        for weight in weights:
            y = product(x, weight)
            x = x + 1e-30 * y[:, :1]  # the next product needs this one
        return y

    return run


def rotating(run: Callable, dtype, weights: list, products: int) -> Callable[[np.ndarray], Call]:
    """A contender whose calls run a chain of `products` over the next weights."""

    def with_x(x):
        x = jnp.asarray(x, dtype)

        def call(i):
            first = i * products
            chosen = [weights[(first + j) % len(weights)] for j in range(products)]
            return run(x, chosen).block_until_ready()

        call.calls = products
        return call

    return with_x


def packed_read(layer: Layer) -> dict[str, Callable[[np.ndarray], Call]]:
    """The floor: every byte of the packed weight read once, on all cores, in long stretches."""
    count = copies(layer.packed_bytes)
    memory = np.ones((count, layer.packed_bytes // 64 * 8), np.uint64)
    pool = ThreadPoolExecutor(THREADS)
    parts = np.array_split(memory.ravel(), THREADS)

    def read(_):
        list(pool.map(np.bitwise_or.reduce, parts))

    read.calls = count  # one call reads every copy
    return {"packed read": lambda x: read}


def dense_jax(layer: Layer, products: int) -> dict[str, Callable[[np.ndarray], Call]]:
    w = layer.dense()
    matmul = chain(jnp.matmul)
    contenders = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        ws = [jnp.array(w, dtype) for _ in range(copies(w.nbytes // 4 * jnp.dtype(dtype).itemsize))]
        contenders[f"JAX dense {'f32' if dtype == jnp.float32 else 'bf16'}"] = rotating(
            matmul, dtype, ws, products
        )
    return contenders


def onnxruntime_peer(layer: Layer) -> dict[str, Callable[[np.ndarray], Call]]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    k, n = layer.k, layer.n
    blocks = layer.codes.T.reshape(n, k // GROUP, GROUP)
    packed = blocks[..., 0::2] | blocks[..., 1::2] << 4
    scales = layer.scales.astype(np.float32).T.reshape(-1)
    contenders = {}
    for level, label in ((1, "f32"), (4, "int8")):
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=GROUP,
            accuracy_level=level,
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
            [
                numpy_helper.from_array(np.ascontiguousarray(packed), "w"),
                numpy_helper.from_array(np.ascontiguousarray(scales), "s"),
            ],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(copies(layer.packed_bytes))
        ]

        def with_x(x, sessions=sessions):
            return lambda i: sessions[i % len(sessions)].run(None, {"x": x})[0]

        contenders[f"onnxruntime {label}"] = with_x
    return contenders


def openvino_peer(layer: Layer) -> dict[str, Callable[[np.ndarray], Call]]:
    import openvino
    from openvino import Core, Model, Type, opset13

    k, n = layer.k, layer.n
    blocks = np.ascontiguousarray(layer.codes.T.reshape(n, k // GROUP, GROUP))
    nibbles = blocks.reshape(-1)
    packed = nibbles[0::2] | nibbles[1::2] << 4
    core = Core()

    def model():
        x = opset13.parameter([-1, k], Type.f32, "x")
        tensor = openvino.Tensor(Type.u4, openvino.Shape([n, k // GROUP, GROUP]))
        tensor.data[:] = packed.reshape(tensor.data.shape)
        codes = opset13.convert(opset13.constant(tensor), "f16")
        eights = openvino.Tensor(Type.u4, openvino.Shape([n, k // GROUP, 1]))
        eights.data[:] = 0x88
        zero = opset13.convert(opset13.constant(eights), "f16")
        scales = opset13.constant(np.ascontiguousarray(layer.scales.T.reshape(n, -1, 1)))
        w = opset13.multiply(opset13.subtract(codes, zero), scales)
        w = opset13.reshape(w, np.array([n, k]), False)
        return Model([opset13.matmul(x, opset13.convert(w, "f32"), False, True)], [x])

    contenders = {}
    for label, group in (("f32", "0"), ("int8", "32")):
        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
            "INFERENCE_NUM_THREADS": str(THREADS),
            "PERFORMANCE_HINT": "LATENCY",
        }
        requests = [
            core.compile_model(model(), "CPU", config).create_infer_request()
            for _ in range(copies(layer.packed_bytes))
        ]

        def with_x(x, requests=requests):
            return lambda i: requests[i % len(requests)].infer([x])[0]

        contenders[f"openvino {label}"] = with_x
    return contenders


def torch_peer(layer: Layer) -> dict[str, Callable[[np.ndarray], Call]]:
    import torch

    torch.set_num_threads(THREADS)
    w = torch.from_numpy(np.ascontiguousarray(layer.dense().T)).to(torch.bfloat16)
    ws = [w.clone() for _ in range(copies(2 * w.numel()))]
    codes = torch.from_numpy(np.ascontiguousarray(layer.codes.T)).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    packs = [packed.clone() for _ in range(copies(layer.packed_bytes))]
    scales = torch.from_numpy(layer.scales.astype(np.float32)).to(torch.bfloat16)
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()

    def dense(x):
        x = torch.from_numpy(x).to(torch.bfloat16)
        return lambda i: torch.nn.functional.linear(x, ws[i % len(ws)]).float().numpy()

    def int4pack(x):
        x = torch.from_numpy(x).to(torch.bfloat16)
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda i: mm(x, packs[i % len(packs)], GROUP, both).float().numpy()

    return {"torch dense bf16": dense, "torch int4pack bf16": int4pack}


PEERS = {"onnxruntime": onnxruntime_peer, "openvino": openvino_peer, "torch": torch_peer}


def contenders_of(
    layer: Layer, products: int
) -> Iterator[tuple[str, Callable[[np.ndarray], Call]]]:
    yield from ours(layer, products).items()
    yield from dense_jax(layer, products).items()
    makers = [packed_read]
    makers += [peer for name, peer in PEERS.items() if importlib.util.find_spec(name)]
    for make in makers:
        yield from make(layer).items()


def measure(
    layer: Layer, rows: list[int], rounds: int, products: int, clock: Callable[[], float]
) -> list[dict]:
    makers = dict(contenders_of(layer, products))
    w = layer.dense()[:, :256].astype(np.float64)
    results = []
    for m in rows:
        x = np.random.default_rng(m).standard_normal((m, layer.k)).astype(np.float32)
        calls = {name: make(x) for name, make in makers.items()}
        exact = x.astype(np.float64) @ w
        errors = {}
        for name, call in calls.items():
            y = call(0)
            if y is not None:
                y = np.asarray(y, np.float64)[:, :256]
                errors[name] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
        times = {name: [] for name in calls}
        for number in range(rounds):
            for name, call in calls.items():
                time.sleep(0.003)  # lets the threads of the contender before stop spinning
                call(number)
                each = getattr(call, "calls", 1)
                repeats = math.ceil(max(2, 96 // m) / each)
                begin = clock()
                for i in range(repeats):
                    call(number + 1 + i)
                times[name].append((clock() - begin) / (repeats * each))
        for name, seconds in times.items():
            to_ours = {
                label: float(np.median(np.divide(seconds, times[label]))) for label in OURS.values()
            }
            results.append(
                {
                    "shape": [layer.k, layer.n],
                    "m": m,
                    "contender": name,
                    "ms": 1e3 * float(np.median(seconds)),
                    "ms_best": 1e3 * float(np.min(seconds)),
                    "error": errors.get(name),
                    "time_over": to_ours,
                }
            )
    return results


def print_table(results: list[dict], rows: list[int]) -> None:
    """Times in ms and, in brackets, times this kernel's f32 time in the same round."""
    for shape in sorted({tuple(r["shape"]) for r in results}):
        print(f"\n{shape[0]} x {shape[1]}, ms (ratio to {OURS['float32']})")
        for name in dict.fromkeys(r["contender"] for r in results):
            cells = []
            for m in rows:
                (r,) = (
                    r
                    for r in results
                    if tuple(r["shape"]) == shape and r["m"] == m and r["contender"] == name
                )
                cells.append(f"{r['ms']:8.3f} ({r['time_over'][OURS['float32']]:5.2f})")
            error = "" if r["error"] is None else f"  error {r['error']:.1e}"
            print(f"{name:22}" + "".join(cells) + error)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({tuple(r["shape"]) for r in results})
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.6), squeeze=False)
    names = list(dict.fromkeys(r["contender"] for r in results))
    colors = dict(zip(names, plt.get_cmap("tab20").colors))
    for axis, shape in zip(axes[0], shapes):
        for name in names:
            mine = [r for r in results if tuple(r["shape"]) == shape and r["contender"] == name]
            axis.loglog(
                [r["m"] for r in mine],
                [r["ms"] for r in mine],
                marker="o" if name in OURS.values() else None,
                linewidth=2.5 if name in OURS.values() else 1.2,
                linestyle=":" if name == "packed read" else "-",
                color=colors[name],
                label=name,
            )
        axis.set_title(f"K x N = {shape[0]} x {shape[1]}")
        axis.set_xlabel("rows of x (M)")
        axis.set_ylabel("ms")
        axis.grid(True, which="both", alpha=0.25)
    axes[0][-1].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,14336x4096")
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--products", type=int, default=8, help="in one jitted graph")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_matmul.json")
    args = parser.parse_args()
    rows = [int(m) for m in args.rows.split(",")]
    results = []
    for shape in args.shapes.split(","):
        k, n = (int(v) for v in shape.split("x"))
        results += measure(Layer(k, n), rows, args.rounds, args.products, CLOCKS[args.clock])
    machine = {
        "cpu": cpu_name(),
        "threads": THREADS,
        "clock": args.clock,
        "products": args.products,
        "kernel": ffi.load("cpu").kernel(),
        "jax": jax.__version__,
        "peers": {
            name: __import__(name).__version__ for name in PEERS if importlib.util.find_spec(name)
        },
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))
    print(machine)
    print_table(results, rows)


if __name__ == "__main__":
    main()
