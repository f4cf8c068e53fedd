"""Nine bugs planted into a copy of the kernels' source: the suite's own check catches each one."""

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_weight

import jax_gptq
from jax_gptq import ffi
from jax_gptq.stores import cuda

SOURCES = Path(__file__).parent.parent / "xla_ffi"
COMPILER = shutil.which("c++")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(ffi.load("cuda_emulated") is None, reason="built without JAX_GPTQ_EMULATOR"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

# Name -> (file, what stands there, what the bug makes of it, what the failure says).
BUGS = {
    "off-by-one k": (
        "mma.cuh",
        "for (int step = first_step; step < last_step; ++step) {",
        "for (int step = first_step; step < last_step - PLANTED; ++step) {",
        "Arrays are not equal",
    ),
    "missing barrier": (
        "mma.cuh",
        "  block_sync();\n  const int padded_n",
        "  if (!PLANTED) block_sync();\n  const int padded_n",
        "a barrier is missing",
    ),
    "swapped zero interleave": (
        "fragment.cuh",
        "0x000f000fu, kNumber<T>), zero[i % 2]);",
        "0x000f000fu, kNumber<T>), zero[(i + PLANTED) % 2]);",
        "Arrays are not equal",
    ),
    "unwritten output column": (
        "mma.cuh",
        "if (m >= p.m || n >= p.n) continue;",
        "if (m >= p.m || n >= p.n - PLANTED) continue;",
        r"byte \d+ of y was never written",
    ),
    "early read of an asynchronous copy": (
        "mma.cuh",
        "    cp_async_wait<kStages - 2>();",
        "    if (!PLANTED) cp_async_wait<kStages - 2>();",
        "while an asynchronous copy into it is in flight",
    ),
    # Of shares of output tiles, where blocks wait for one another.
    "sums handed over without a barrier": (
        "wgmma.cuh",
        "warp_sync();\n        if (lane == 0) barrier_arrive_expect(handed, 0);",
        "if (!PLANTED) warp_sync();\n        if (lane == 0) barrier_arrive_expect(handed, 0);",
        "written by another block of the same launch",
    ),
    "flag raised too early": (
        "wgmma.cuh",
        "    barrier_wait(handed, 0);",
        "    if (!PLANTED) barrier_wait(handed, 0);",
        "written by another block of the same launch|nobody has written",
    ),
    "flag left raised": (
        "wgmma.cuh",
        "if (mine) lower_flag(flag);",
        "if (mine && !PLANTED) lower_flag(flag);",
        "leaves a flag raised",
    ),
    "wait for a block that starts later": (
        "wgmma.cuh",
        "  return args.clusters - 1 - cluster_index();",
        "  return PLANTED ? cluster_index() : args.clusters - 1 - cluster_index();",
        "no block before it has raised",
    ),
}

# What chooses a bug and a device, one block of class B, and kernels that are not looked at here.
OTHERS = """
#include "../emulator/handler.h"
#include "kernels.h"
#include "wgmma.cuh"
#include "wgmma_launch.h"
int planted = 0;
extern "C" void plant(int bug) { planted = bug; }
extern "C" void device(int arch) {
  jax_gptq::emulator::Settings settings{{arch, 132}};
  if (arch == 90) settings.wgmma = {128, 64, 1, 5};
  jax_gptq::emulator::set(settings);
}
namespace jax_gptq::cuda {
void block(WgmmaArguments args, TensorMap x, TensorMap codes, TensorMap scales, TensorMap zeros,
           TensorMap y) {
  wgmma_block<Bf16, 4, WgmmaMode::kGeneral, 128, 64>(args, x, codes, scales, zeros, y);
}
cudaError_t launch_wgmma(const Problem& problem, const WgmmaPlan& plan, void* workspace,
                         cudaStream_t stream) {
  const WgmmaArguments args = wgmma_arguments(problem, plan, workspace);
  const WgmmaMaps maps = wgmma_maps(problem, plan, args);
  const Grid grid{dim3(plan.clusters), wgmma_threads(wgmma_consumers(128, 64)), 1,
                  args.shared_bytes, args.in_shares};
  return launch(block, "wgmma", grid, stream, args, maps.x, maps.codes, maps.scales, maps.zeros,
                maps.y);
}
cudaError_t launch_decode(const Problem&, const Plan&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_dequantize(const Problem&, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_pack(const RepackProblem&, const uint32_t*, void*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_unpack(const RepackProblem&, const void*, uint32_t*, cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace jax_gptq::cuda
"""


@functools.cache
def build(folder: Path) -> ctypes.CDLL:
    """The emulator with all bugs in; `plant(i)` chooses the i-th, 0 none."""
    for name in ("cuda", "emulator"):
        shutil.copytree(SOURCES / name, folder / name)
    for number, (file, right, wrong, _) in enumerate(BUGS.values(), 1):
        path = folder / "cuda" / file
        text = path.read_text()
        assert text.count(right) == 1, f"{file} no longer holds: {right}"
        path.write_text(text.replace(right, wrong.replace("PLANTED", f"(planted == {number})")))
    (folder / "cuda" / "others.cc").write_text(OTHERS)
    for file in {file for file, *_ in BUGS.values()}:
        path = folder / "cuda" / file
        path.write_text(
            re.sub("\nnamespace", "\nextern int planted;\nnamespace", path.read_text(), count=1)
        )
    sources = [f"emulator/{name}.cc" for name in ("handler", "machine", "memory", "fiber", "wgmma")]
    sources += [f"cuda/{name}.cu" for name in ("matmul", "mma", "reduce")]
    sources += [f"cuda/{name}.cc" for name in ("plan", "wgmma_plan", "others")]
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DJAX_GPTQ_EMULATED"]
    options += [f"-I{folder}/emulator/include", f"-isystem{jax.ffi.include_dir()}"]
    compilations = [
        subprocess.Popen(
            [COMPILER, *options, "-x", "c++", "-c", source, "-o", f"{i}.o"], cwd=folder
        )
        for i, source in enumerate(sources)
    ]
    assert all(compilation.wait() == 0 for compilation in compilations)
    objects = [f"{i}.o" for i in range(len(sources))]
    subprocess.run([COMPILER, "-shared", *objects, "-o", "planted.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "planted.so"))
    jax.ffi.register_ffi_target(
        "jax_gptq.planted.matmul.v1",
        jax.ffi.pycapsule(library.JaxGptqEmulatedMatmul),
        platform="cpu",
    )
    return library


@pytest.fixture
def planted(tmp_path_factory, monkeypatch):
    library = build(tmp_path_factory.getbasetemp() / "planted")
    monkeypatch.setitem(cuda._MODULES, "cuda-emulated", "planted")
    yield library
    library.plant(0)


def check():
    """`test_integers_are_exact` of the suite, on one case of a pipelined kernel."""
    rng = np.random.default_rng(0)
    weight, matrix = random_weight(rng, 320, 100, group_size=64, exact=True)
    x = rng.integers(-2, 3, (40, 320)).astype(jnp.bfloat16)
    y = jax_gptq.gptq_matmul(x, jax_gptq.prepare(weight, "cuda"), "cuda-emulated")
    np.testing.assert_array_equal(np.asarray(y), (x.astype(np.float64) @ matrix).astype(y.dtype))


@pytest.mark.parametrize("arch", [80, 90])
def test_the_copy_without_a_bug_passes(planted, arch):
    planted.device(arch)
    check()


@pytest.mark.parametrize("bug", BUGS)
def test_the_suite_catches(planted, bug):
    planted.device(90 if BUGS[bug][0] == "wgmma.cuh" else 80)
    planted.plant(list(BUGS).index(bug) + 1)
    with pytest.raises(
        (AssertionError, ValueError, jax.errors.JaxRuntimeError), match=BUGS[bug][3]
    ):
        check()
