"""`jax-gptq <command>`: parses, calls, prints."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from jax_gptq.errors import JaxGptqError

# Command -> the module whose `add_arguments(parser)` and `run(args)` implement it, and its help.
_COMMANDS = {
    "inspect": ("jax_gptq.checkpoint.inspect", "formats, bits, groups and sizes of a checkpoint"),
    "generate": ("jax_gptq.models.cli", "generate text from a checkpoint folder"),
    "quantize": ("jax_gptq.quantize.cli", "quantize a model folder with GPTQ"),
    "eval": ("jax_gptq.models.perplexity", "perplexity of models on a text, side by side"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: an error that the message explains)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="jax-gptq", description="GPTQ-quantized models in JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        # Only the chosen command's module is imported: each pulls in other dependencies.
        if argv[:1] == [name]:
            modules[name] = _import(module)
            modules[name].add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args) or 0
    except JaxGptqError as error:
        print(f"jax-gptq: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jax_gptq"):
            raise
        print(
            f"jax-gptq: this command needs the package {error.name!r}: pip install 'jax_gptq[all]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


if __name__ == "__main__":
    sys.exit(main())
