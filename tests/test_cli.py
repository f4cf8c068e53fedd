"""The command line: statuses and messages (each command's own tests are beside its module's)."""

import subprocess
import sys

import pytest

import jax_gptq
from jax_gptq import cli


def test_help_lists_the_commands():
    child = subprocess.run(
        [sys.executable, "-P", "-m", "jax_gptq.cli", "--help"], capture_output=True, text=True
    )
    assert child.returncode == 0
    for command in ("inspect", "generate", "quantize", "eval"):
        assert command in child.stdout


def test_an_error_is_one_line_and_status_2(capsys, tmp_path):
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "nothing" in err


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["fly"])
    assert info.value.code == 2
    assert "fly" in capsys.readouterr().err


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = jax_gptq.fly


@pytest.mark.parametrize("name", ["nnx", "linen", "models"])
def test_a_missing_extra_is_named(name):
    """The core imports without flax; what needs it says which extra has it."""
    script = (
        "import sys; sys.modules['flax'] = None\n"
        "import jax_gptq\n"
        "try:\n"
        f"    jax_gptq.{name}\n"
        "except jax_gptq.JaxGptqError as error:\n"
        "    print(error)\n"
    )
    child = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    extra = "models" if name == "models" else "flax"
    assert f"pip install 'jax_gptq[{extra}]'" in child.stdout
