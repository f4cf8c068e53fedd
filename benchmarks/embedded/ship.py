"""Quantizes the trained model to 4 bits and puts it into the package.

    python benchmarks/embedded/ship.py MODEL_DIR [OUT_DIR]

MODEL_DIR is what `train.py` wrote; the calibration text is its `train.txt`.
"""

import argparse
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_gptq.models import embedded_path, load
from jax_gptq.models.tokenizer import Tokenizer
from jax_gptq.quantize import QuantizeConfig, quantize_model
from jax_gptq.quantize.save import save_checkpoint

CONFIG = QuantizeConfig(bits=4, group_size=64, sym=True)
LARGEST = 3_000_000  # bytes of the whole folder
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")


def calibration(model: Path, windows: int = 128, length: int = 256) -> list[np.ndarray]:
    """Evenly spaced windows of the training text, int32 [8, length] each."""
    tokens = np.array(Tokenizer(model).encode((model / "train.txt").read_text()), np.int32)
    starts = np.linspace(0, len(tokens) - length, windows).astype(int)
    rows = np.stack([tokens[start : start + length] for start in starts])
    return [rows[i : i + 8] for i in range(0, windows, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("out", type=Path, nargs="?", default=embedded_path(), metavar="OUT_DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quantized = quantize_model(
        load(args.model, dtype=jnp.float32),
        calibration(args.model),
        CONFIG,
        on_layer=lambda name, report: print(
            f"{name:<40} relative loss {report.relative_loss:.5f}", flush=True
        ),
    )
    save_checkpoint(quantized, args.out, dtype=np.float16)
    for name in _FILES:
        shutil.copyfile(args.model / name, args.out / name)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {size} bytes")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST} bytes: choose a smaller model or larger groups")


if __name__ == "__main__":
    main()
