"""Memory of a process that loads a synthetic 1 GB checkpoint, above what its stores hold.

    python benchmarks/load_memory.py [--bytes 1000000000] [--layout cpu]

Writes a 4-bit checkpoint (group size 128, 2048 x 8192 linears, act-order in every fourth) to a
temporary folder, loads it in a child process with `load_weights` and with `load_linears`, and
prints RssAnon + RssShmem of /proc/self/status (mapped file pages do not count) at the peak and at
the end, less the bytes of the stores and less what the process held before loading.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

K, N, GROUP = 2048, 8192, 128
MODULE_BYTES = K * N // 2 + K // GROUP * N * 2 + K // GROUP * N // 2 + K * 4

CHILD = """
import json, sys, threading, time
import jax, jax_gptq

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))

path, layout = sys.argv[1:]
jax.numpy.zeros(1).block_until_ready()
before, peak, running = resident(), 0, True

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.01)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
if layout == "weights":
    loaded = jax_gptq.load_weights(path)
else:
    loaded = jax_gptq.load_linears(path, layout)
jax.block_until_ready(loaded)
seconds = time.perf_counter() - start
running = False
watcher.join()
held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
print(json.dumps({"before": before, "peak": peak, "end": resident(), "stores": held,
                  "modules": len(loaded), "seconds": seconds}))
"""


def write_checkpoint(folder: Path, size: int) -> int:
    """Shards of 16 modules each; returns the bytes of tensors written."""
    rng = np.random.default_rng(0)
    config = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": True, "quant_method": "gptq"}
    (folder / "quantize_config.json").write_text(json.dumps(config))
    modules = max(1, round(size / MODULE_BYTES))
    shards = -(-modules // 16)
    for shard in range(shards):
        tensors = {}
        for module in range(shard * 16, min(modules, shard * 16 + 16)):
            words = rng.integers(0, 2**32, (K // 8, N), np.uint32).view(np.int32)
            g_idx = (np.arange(K) // GROUP).astype(np.int32)
            if module % 4 == 0:
                g_idx = rng.permutation(g_idx)
            prefix = f"model.layers.{module}.up_proj"
            tensors[f"{prefix}.qweight"] = words
            tensors[f"{prefix}.qzeros"] = np.full((K // GROUP, N // 8), 0x77777777, np.int32)
            tensors[f"{prefix}.scales"] = np.full((K // GROUP, N), 0.01, np.float16)
            tensors[f"{prefix}.g_idx"] = g_idx
        save_file(tensors, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")
    return modules * MODULE_BYTES


def measure(folder: Path, layout: str) -> dict:
    """What the child process reports."""
    command = [sys.executable, "-c", CHILD, str(folder), layout]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main() -> None:
    """Print one line per way of loading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--layouts", nargs="+", default=["weights", "cpu", "reference"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        written = write_checkpoint(Path(temporary), args.bytes)
        print(f"checkpoint: {written / 1e6:.0f} MB")
        for layout in args.layouts:
            found = measure(Path(temporary), layout)
            above = {key: (found[key] - found["stores"]) / 1e6 for key in ("peak", "end")}
            print(
                f"{layout:>9}: {found['modules']} modules, stores {found['stores'] / 1e6:.0f} MB, "
                f"RssAnon + RssShmem above the stores: peak {above['peak']:.0f} MB, end "
                f"{above['end']:.0f} MB (before loading {found['before'] / 1e6:.0f} MB); "
                f"{found['seconds']:.1f} s"
            )


if __name__ == "__main__":
    main()
