"""What the compiler says about the CUDA kernels: nothing spills, and the instructions that matter
are there. Runs where `nvcc` is on the path; looking at the machine code also wants `nvdisasm`."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "xla_ffi" / "cuda"
ARCHITECTURES = ["sm_80", "sm_90a"]
# wgmma is for sm_90a alone; matmul.cu only dispatches.
KERNELS = ["decode", "mma", "reduce", "dequantize", "repack"]
CASES = [(k, a) for a in ARCHITECTURES for k in KERNELS] + [("wgmma", "sm_90a")]

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the path")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(kernel, architecture) -> (cubin, what ptxas said), each compiled once."""
    folder = tmp_path_factory.mktemp("cubin")
    done = {}

    def compile_one(kernel, architecture):
        if (kernel, architecture) not in done:
            cubin = folder / f"{kernel}.{architecture}.cubin"
            virtual = architecture.replace("sm", "compute")
            options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
            target = f"arch={virtual},code={architecture}"
            said = subprocess.run(
                ["nvcc", *options, "-gencode", target, "-o", cubin, CUDA / f"{kernel}.cu"],
                capture_output=True,
                text=True,
            )
            assert said.returncode == 0, said.stderr
            done[kernel, architecture] = cubin, said.stdout + said.stderr
        return done[kernel, architecture]

    return compile_one


@pytest.mark.parametrize("kernel, architecture", CASES)
def test_nothing_spills(compiled, kernel, architecture):
    _, said = compiled(kernel, architecture)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert frames, said
    assert set(frames) == {("0", "0", "0")}, said


@pytest.mark.parametrize(
    "kernel, instructions",
    [
        ("decode", [r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128", r"LDSM\.16\.M88\.4", r"HMMA\.16816"]),
        ("mma", [r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"HMMA\.16816"]),
        ("dequantize", [r"LDG\.E\.128\.CONSTANT", r"STG\.E\.128"]),
        (
            "wgmma",
            [r"HGMMA\.64x\d+x16\.F32\.BF16", r"HGMMA\.64x\d+x16\.F32 ", r"UTMALDG", r"LDS\.128"],
        ),
    ],
)
def test_instructions(compiled, kernel, instructions):
    """On sm_90a: copies and loads of 16 bytes, and the tensor cores' instructions."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("nvdisasm is not on the path, beside nvcc or in Triton's package")
    cubin, _ = compiled(kernel, "sm_90a")
    code = subprocess.run(
        [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    for instruction in instructions:
        assert re.search(instruction, code), f"{kernel}: no {instruction}"


def find_nvdisasm():
    beside = Path(shutil.which("nvcc")).resolve().parent / "nvdisasm"
    candidates = [shutil.which("nvdisasm"), beside]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    return next((path for path in candidates if path and Path(path).exists()), None)
