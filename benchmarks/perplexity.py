"""Perplexity on held-back text: float, round-to-nearest, GPTQ and GPTQ with act-order.

    python benchmarks/perplexity.py MODEL_DIR [--out benchmarks/results]

MODEL_DIR is what `benchmarks/embedded/train.py` wrote: a float model, `train.txt` (calibration) and
`held_back.txt` (never trained on, never calibrated on). Writes perplexity.csv, .md and .png.
"""

import argparse
import csv
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jax_gptq.models import linears, load
from jax_gptq.models.perplexity import mean_loss
from jax_gptq.models.tokenizer import Tokenizer
from jax_gptq.quantize import QuantizeConfig, quantize_model, rtn
from jax_gptq.reference import dequantize

# Column of the table -> options of QuantizeConfig, whose defaults include the final refinement.
GPTQ = {"GPTQ": {}, "GPTQ, act-order": {"desc_act": True}}


def main() -> None:
    args = _arguments()
    tokenizer = Tokenizer(args.model)
    calibration = _windows(tokenizer.encode((args.model / "train.txt").read_text()), args)
    held_back = np.array(tokenizer.encode((args.model / "held_back.txt").read_text()))

    rows = []

    def add(method: str, bits: int, model) -> None:
        loss = mean_loss(model, held_back, context=args.context, batch_size=8)
        rows.append((method, bits, loss))
        print(f"{bits:>2} bits  {method:<18} loss {loss:.6f}  {math.exp(loss):.4f}", flush=True)

    add("float", 16, load(args.model, dtype=jnp.float32))
    for bits in args.bits:
        options = dict(bits=bits, group_size=args.group_size, sym=True)
        add("round-to-nearest", bits, rounded(args.model, options))
        for method, more in GPTQ.items():
            model = load(args.model, dtype=jnp.float32)
            config = QuantizeConfig(**options, **more)
            add(method, bits, quantize_model(model, calibration, config))
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, len(held_back), args)
    plot(rows, args.out / "perplexity.png", args.group_size)


def rounded(path: Path, options: dict):
    """The model with every linear of its blocks rounded to nearest, on the grid GPTQ uses."""
    model = load(path, dtype=jnp.float32)
    for layer in linears(model).values():
        layer.kernel[...] = dequantize(rtn(layer.kernel[...], **options))
    return model


def _windows(tokens: list[int], args) -> list[jax.Array]:
    """Evenly spaced windows of the calibration text, int32 [8, context] each."""
    starts = np.linspace(0, len(tokens) - args.context, args.windows).astype(int)
    stream = np.array(tokens, np.int32)
    rows = np.stack([stream[start : start + args.context] for start in starts])
    return [jnp.asarray(rows[i : i + 8]) for i in range(0, len(rows), 8)]


def write_table(rows: list[tuple[str, int, float]], tokens: int, args) -> None:
    with (args.out / "perplexity.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "bits", "loss", "perplexity"])
        writer.writerows([m, b, f"{loss:.6f}", f"{math.exp(loss):.4f}"] for m, b, loss in rows)
    methods = ["round-to-nearest", *GPTQ]
    found = {(method, bits): math.exp(loss) for method, bits, loss in rows}
    lines = [
        f"Perplexity per token on {tokens} held-back tokens, windows of {args.context}, "
        f"symmetric, groups of {args.group_size}, calibrated on {args.windows * args.context} "
        f"tokens of the training text. Float: {found['float', 16]:.3f}.",
        "",
        "| bits | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for bits in args.bits:
        cells = " | ".join(f"{found[method, bits]:.3f}" for method in methods)
        lines.append(f"| {bits} | {cells} |")
    (args.out / "perplexity.md").write_text("\n".join(lines) + "\n")


def plot(rows: list[tuple[str, int, float]], path: Path, group_size: int) -> None:
    """Increase over the float model, in percent; linear below 0.01, where 8 bits are."""
    float_loss = rows[0][2]
    widths = sorted({bits for _, bits, _ in rows[1:]}, reverse=True)
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for method in ["round-to-nearest", *GPTQ]:
        found = {bits: loss for name, bits, loss in rows if name == method}
        increase = [100 * math.expm1(found[bits] - float_loss) for bits in widths]
        axes.plot(range(len(widths)), increase, marker="o", label=method)
    axes.axhline(0, color="black", linewidth=1, linestyle="--", label="float")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=-0.01, top=100)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set(
        xlabel=f"bits (groups of {group_size})",
        ylabel="increase of perplexity, held-back text",
        xticks=range(len(widths)),
        xticklabels=widths,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128, help="of calibration text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
