"""Perplexity and divergence on held-back text: round-to-nearest, GPTQ and GPTQ with act-order.

    python benchmarks/perplexity.py MODEL_DIR [--out benchmarks/results]

MODEL_DIR is what `benchmarks/embedded/train.py` wrote: a float model, `train.txt` (calibration) and
`held_back.txt` (never trained on, never calibrated on). Writes perplexity.csv, .md and .png.

The divergence is the mean over positions of KL(float || quantized), in nats: how far predictions
are from the float model's. Perplexity also counts whether they moved towards the one token that
came or away from it, which at 8 bits is chance: hence the standard error of its difference from
float.
"""

import argparse
import csv
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

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
    reference = load(args.model, dtype=jnp.float32)

    def add(method: str, bits: int, model) -> None:
        loss = mean_loss(model, held_back, context=args.context, batch_size=8)
        divergence, error = compare(reference, model, held_back, args.context)
        rows.append((method, bits, loss, divergence, error))
        print(
            f"{bits:>2} bits  {method:<18} loss {loss:.6f}  {math.exp(loss):.4f}  "
            f"divergence {divergence:.3e}  standard error of the loss {error:.1e}",
            flush=True,
        )

    add("float", 16, reference)
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


def compare(reference, model, tokens: np.ndarray, context: int) -> tuple[float, float]:
    """Mean KL(reference || model) and the standard error of the mean difference of their losses."""
    windows = tokens[: tokens.size // (8 * context) * 8 * context].reshape(-1, 8, context)
    divergences, differences = [], []
    for batch in windows.astype(np.int32):
        divergence, difference = _compare(reference, model, jnp.asarray(batch))
        divergences.append(np.asarray(divergence, np.float64))
        differences.append(np.asarray(difference, np.float64))
    error = np.std(differences) / math.sqrt(np.size(differences))
    return float(np.mean(divergences)), float(error)


@nnx.jit
def _compare(reference, model, tokens):
    """KL(reference || model) [B, T], and by how much each token's loss differs [B, T - 1]."""
    expected, found = (jax.nn.log_softmax(m(tokens)) for m in (reference, model))
    difference = jnp.take_along_axis((expected - found)[:, :-1], tokens[:, 1:, None], axis=-1)
    return jnp.sum(jnp.exp(expected) * (expected - found), axis=-1), difference[..., 0]


def _windows(tokens: list[int], args) -> list[jax.Array]:
    """Evenly spaced windows of the calibration text, int32 [8, context] each."""
    starts = np.linspace(0, len(tokens) - args.context, args.windows).astype(int)
    stream = np.array(tokens, np.int32)
    rows = np.stack([stream[start : start + args.context] for start in starts])
    return [jnp.asarray(rows[i : i + 8]) for i in range(0, len(rows), 8)]


def write_table(rows: list[tuple[str, int, float, float, float]], tokens: int, args) -> None:
    with (args.out / "perplexity.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "bits", "loss", "perplexity", "divergence", "loss_error"])
        for method, bits, loss, divergence, error in rows:
            numbers = f"{loss:.6f}", f"{math.exp(loss):.4f}", f"{divergence:.3e}", f"{error:.1e}"
            writer.writerow([method, bits, *numbers])
    methods = ["round-to-nearest", *GPTQ]
    found = {(method, bits): (math.exp(loss), kl) for method, bits, loss, kl, _ in rows}
    lines = [
        f"Perplexity per token on {tokens} held-back tokens / mean KL(float || quantized) in nats, "
        f"windows of {args.context}, symmetric, groups of {args.group_size}, calibrated on "
        f"{args.windows * args.context} tokens of the training text. Float: "
        f"{found['float', 16][0]:.3f}.",
        "",
        "| bits | " + " | ".join(methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for bits in args.bits:
        cells = ("{:.3f} / {:.2g}".format(*found[method, bits]) for method in methods)
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    (args.out / "perplexity.md").write_text("\n".join(lines) + "\n")


def plot(rows: list[tuple[str, int, float, float, float]], path: Path, group_size: int) -> None:
    """Left the increase of perplexity, linear below 0.01 %, where 8 bits are; right divergence."""
    float_loss = rows[0][2]
    widths = sorted({bits for _, bits, *_ in rows[1:]}, reverse=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained")
    for method in ["round-to-nearest", *GPTQ]:
        found = {bits: (loss, kl) for name, bits, loss, kl, _ in rows if name == method}
        increase = [100 * math.expm1(found[bits][0] - float_loss) for bits in widths]
        left.plot(range(len(widths)), increase, marker="o", label=method)
        right.plot(range(len(widths)), [found[bits][1] for bits in widths], marker="o")
    left.axhline(0, color="black", linewidth=1, linestyle="--", label="float")
    left.set_yscale("symlog", linthresh=0.01)
    left.set_ylim(bottom=-0.01, top=100)
    left.yaxis.set_major_formatter("{x:g}%")
    left.set_ylabel("increase of perplexity, held-back text")
    left.legend(frameon=False)
    right.set_yscale("log")
    right.set_ylabel("KL(float || quantized), nats per token")
    for axes in (left, right):
        axes.set(
            xlabel=f"bits (groups of {group_size})",
            xticks=range(len(widths)),
            xticklabels=widths,
        )
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
