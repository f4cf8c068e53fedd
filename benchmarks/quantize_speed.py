"""Seconds and memory of one layer: GPTQModel's solver and this one, interleaved, on the same H.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/quantize_speed.py --size 4096

Neither side counts the accumulation of H; compilation, once per shape, is shown apart. Memory is
the peak resident set of a process of its own in a second run, less what it held before with W and H
loaded and everything compiled.
"""

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_gptq.quantize import gptq

MEMORY_OF = {
    "plain": {"refine": False},
    "plain, act-order": {"refine": False, "desc_act": True},
    "refined": {},
    "refined, act-order": {"desc_act": True},
}


def layer(size: int) -> tuple[np.ndarray, np.ndarray]:
    """W and a correlated H."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((size, size), np.float32) * np.float32(0.02)
    x = rng.standard_normal((2 * size, size), np.float32) * rng.uniform(0.2, 2, size)
    x[:, 1:] += np.float32(0.5) * x[:, :-1]
    x = x.astype(np.float32)
    return W, 2 / len(x) * (x.T @ x)


def ours(W, H, **options) -> float:
    start = time.perf_counter()
    weight, _ = gptq(W, H, damp=0.01, **options)
    jax.block_until_ready(weight.qweight)
    return time.perf_counter() - start


def peak_memory(size: int, options: dict) -> None:
    """Prints bytes beyond W and H, in a process of its own."""
    W, H = map(jnp.asarray, layer(size))
    ours(W, H, **options)  # compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # starts a new peak
    ours(W, H, **options)
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    print(peak - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", choices=MEMORY_OF, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        peak_memory(args.size, MEMORY_OF[args.memory_of])
        return
    from gptqmodel_peer import gptqmodel

    W, H = layer(args.size)
    for refine in (False, True):
        print(
            f"compile and first run, refine={refine}: {ours(W, H, refine=refine):.1f} s", flush=True
        )
    ratios = []
    for _ in range(args.repeats):
        theirs = gptqmodel(W, H, bits=4, group_size=128)[1]
        plain, refined = ours(W, H, refine=False), ours(W, H)
        ratios.append(theirs / plain)
        print(
            f"GPTQModel {theirs:.2f} s, GPTQ here {plain:.2f} s, refined {refined:.2f} s: "
            f"x {theirs / plain:.2f}, refined x {theirs / refined:.2f}",
            flush=True,
        )
    print(f"median speed-up of plain GPTQ: x {np.median(ratios):.2f}")
    size = W.nbytes
    for kind in MEMORY_OF:
        command = [sys.executable, __file__, f"--size={args.size}", f"--memory-of={kind}"]
        beyond = int(subprocess.run(command, check=True, capture_output=True).stdout.split()[-1])
        print(
            f"memory of {kind}: W and H and {beyond / size:.2f} x W beyond them "
            f"(in all {(2 * size + beyond) / size:.2f} x W; 3 x W + H is 4)"
        )


if __name__ == "__main__":
    main()
