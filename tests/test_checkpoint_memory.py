"""Loading costs little more memory than what is kept: a 1 GB checkpoint, in a child process."""

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import load_memory


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as temporary:
        load_memory.write_checkpoint(Path(temporary), 1_000_000_000)
        yield Path(temporary)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layout", ["weights", "cpu"])
def test_loading_keeps_one_linear_beyond_the_stores(folder, layout):
    found = load_memory.measure(folder, layout)
    assert found["stores"] > 0.99e9
    assert found["peak"] < found["stores"] + 300e6
