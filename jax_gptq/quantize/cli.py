"""`jax-gptq quantize MODEL_DIR OUT_DIR`: a model folder in, a GPTQ model folder out."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_gptq.checkpoint import open_checkpoint
from jax_gptq.errors import QuantizationError
from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.report import Report

# Files of a model folder that a quantized model needs as they are.
_COPIED = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
_EMBEDDINGS = (".embed_tokens.weight", ".wte.weight")
_COPIED_NAMES = ("generation_config.json", "spiece.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `jax-gptq quantize`."""
    defaults = QuantizeConfig()
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="float checkpoint folder")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write; must not exist")
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text to calibrate on")
    parser.add_argument("--bits", type=int, default=defaults.bits, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=defaults.group_size, help="-1: one group")
    parser.add_argument("--asym", action="store_true", help="zero points per group")
    parser.add_argument("--desc-act", action="store_true", help="solve important rows first")
    parser.add_argument("--static-groups", action="store_true", help="no g_idx with --desc-act")
    parser.add_argument("--act-group-aware", action="store_true", help="important groups first")
    parser.add_argument("--damp", type=float, default=defaults.damp, help="fraction of mean diag H")
    parser.add_argument("--mse", type=float, default=defaults.mse, help="clip search exponent: 2.4")
    parser.add_argument("--no-refine", action="store_true", help="plain GPTQ")
    parser.add_argument("--asymmetric", action="store_true", help="GPTAQ: aim at float outputs")
    parser.add_argument("--samples", type=int, default=128, help="windows of text (default: 128)")
    parser.add_argument("--context", type=int, help="tokens per window (default: 2048 or less)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--format", default="gptq", choices=["gptq", "gptq_v2"])
    parser.add_argument("--max-shard-size", type=int, default=5_000_000_000, help="bytes per file")


def run(args: argparse.Namespace) -> int:
    """`jax-gptq quantize`: one line per layer, a bar, the time left.

    All is written to `OUT_DIR.partial`, which a killed run is resumed from, and renamed at the end.

    Raises:
      MissingFileError, ModelError: no such text, or it is not UTF-8.
      QuantizationError: OUT_DIR exists, or the text is too short.
    """
    from jax_gptq.models import linears, load
    from jax_gptq.models.tokenizer import read_text
    from jax_gptq.quantize.model import quantize_model
    from jax_gptq.quantize.save import save_checkpoint

    if args.out.exists():
        raise QuantizationError(f"{args.out}: expected a folder that is not there yet, found one")
    text = read_text(args.data)
    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asym,
        desc_act=args.desc_act,
        static_groups=args.static_groups,
        act_group_aware=args.act_group_aware,
        damp=args.damp,
        mse=args.mse,
        refine=not args.no_refine,
        asymmetric=args.asymmetric,
    )
    print(f"reading {args.model} ...", file=sys.stderr, flush=True)
    model = load(args.model, dtype=jnp.dtype(args.dtype))
    batches = _batches(args, text, model.config.max_positions)
    partial = args.out.with_name(args.out.name + ".partial")
    progress = _Progress(len(linears(model)))
    quantized = quantize_model(
        model, batches, config, finished=partial / "layers", on_layer=progress
    )
    written = partial / "checkpoint"
    shutil.rmtree(written, ignore_errors=True)
    stored = open_checkpoint(args.model)
    embedding = next(name for name in stored.names() if f".{name}".endswith(_EMBEDDINGS))
    save_checkpoint(
        quantized,
        written,
        checkpoint_format=args.format,
        dtype=stored.tensor(embedding).dtype,
        max_shard_size=args.max_shard_size,
    )
    for file in sorted(args.model.iterdir()):
        if file.name.startswith(_COPIED) or file.name in _COPIED_NAMES:
            shutil.copyfile(file, written / file.name)
    os.replace(written, args.out)
    shutil.rmtree(partial)
    print(f"{args.out}: {len(progress.reports)} layers at {args.bits} bits")
    for name, report in progress.reports.items():
        for note in report.notes:
            print(f"  {name}: {note}")
    return 0


def _batches(args: argparse.Namespace, text: str, max_positions: int | None) -> list[np.ndarray]:
    """Evenly spaced windows of the text: int32 [batch, context] each."""
    from jax_gptq.models.tokenizer import Tokenizer

    tokens = np.asarray(Tokenizer(args.model).encode(text), np.int32)
    context = args.context or min(max_positions or 2048, 2048)
    if args.samples < 1 or args.batch_size < 1 or context < 1:
        raise QuantizationError("--samples, --batch-size and --context must be at least 1")
    if tokens.size < context:
        raise QuantizationError(
            f"{args.data}: expected at least one window of {context} tokens, found {tokens.size}; "
            f"pass more text or a smaller --context"
        )
    windows = tokens[: tokens.size // context * context].reshape(-1, context)
    count = min(args.samples, len(windows))
    windows = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    whole = max(count // args.batch_size, 1)  # equal batches compile once; a remainder is left out
    size = min(args.batch_size, count)
    print(f"calibrating on {whole * size} windows of {context} tokens", file=sys.stderr, flush=True)
    return list(windows[: whole * size].reshape(whole, size, context))


class _Progress:
    """Prints a layer when it is finished, and a bar with the time left on a terminal."""

    def __init__(self, layers: int):
        self.layers = layers
        self.reports: dict[str, Report] = {}
        self.start = time.monotonic()

    def __call__(self, name: str, report: Report) -> None:
        self.reports[name] = report
        done = len(self.reports)
        spent = time.monotonic() - self.start
        left = spent / done * (self.layers - done)
        bar = "#" * (20 * done // self.layers)
        gain = 1 - report.loss / report.gptq_loss if report.gptq_loss > 0 else 0.0
        print(
            f"[{bar:<20}] {done}/{self.layers} {_clock(left)} left  {name:<40} "
            f"loss {report.loss:.4g}  relative {report.relative_loss:.2e}  refined {gain:.1%}",
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
