"""Perplexity of models on a text, and `jax-gptq eval`: several models side by side."""

import argparse
import math
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_gptq.errors import ModelError


class LanguageModel(Protocol):
    """A Flax module: tokens int32 [B, T] -> logits [B, T, vocab]; `config` as `DecoderConfig`."""

    config: Any

    def __call__(self, tokens: jax.Array, /) -> jax.Array: ...


def perplexity(
    model: LanguageModel,
    tokens,
    *,
    context: int | None = None,
    batch_size: int = 4,
) -> float:
    """exp of the mean negative log likelihood of each token given the ones before it.

    The text is cut into windows of `context` tokens and every window is predicted on its own, the
    usual measure of the GPTQ paper (Frantar et al. 2022); a window starts with the last token of
    the one before, so every token but the first is predicted exactly once.

    Args:
      model: an `nnx.Module`, tokens int32 [B, T] -> logits [B, T, vocab].
      tokens: integers [n], n >= 2, of one text.
      context: positions a window feeds to the model; None: `model.config.max_positions`, at most
        2048.
      batch_size: windows per call of the model.

    Raises:
      ModelError: fewer than two tokens, a token outside the vocabulary, or a context or batch size
        below 1.
    """
    return math.exp(mean_loss(model, tokens, context=context, batch_size=batch_size))


def mean_loss(
    model: LanguageModel, tokens, *, context: int | None = None, batch_size: int = 4
) -> float:
    """The natural logarithm of `perplexity`, same arguments: nats per token."""
    stream = np.asarray(tokens)
    if stream.ndim != 1 or stream.size < 2 or not np.issubdtype(stream.dtype, np.integer):
        raise ModelError(
            f"perplexity needs one text of at least two integer tokens, "
            f"found {stream.dtype}{list(stream.shape)}"
        )
    if not 0 <= stream.min() <= stream.max() < model.config.vocab_size:
        raise ModelError(
            f"perplexity: expected tokens from 0 to {model.config.vocab_size - 1}, "
            f"found {stream.min()} to {stream.max()}"
        )
    context = min(model.config.max_positions, 2048) if context is None else context
    if context < 1 or batch_size < 1:
        raise ModelError(
            f"perplexity: expected a context and a batch size of at least 1, found {context} and "
            f"{batch_size}"
        )
    inputs, targets, counted = _windows(stream, context)
    total = 0.0  # a Python float: f32 sums of 1e5 terms would lose the differences looked for
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, start + batch_size)
        batch = [_fill(array[rows], batch_size) for array in (inputs, targets, counted)]
        total += float(np.sum(np.asarray(_losses(model, *batch)), dtype=np.float64))
    if not math.isfinite(total):
        raise ModelError("perplexity: the model's logits are not finite on this text")
    return total / (stream.size - 1)


@nnx.jit
def _losses(model, inputs, targets, counted):
    """Negative log likelihood [B, T] of `targets`, zero where `counted` is false."""
    logits = model(inputs).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)


def _windows(stream: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs, targets int32 and counted bool, each [windows, T]; the last window is padded."""
    context = min(context, stream.size - 1)
    count = -(-(stream.size - 1) // context)
    padded = np.zeros(count * context + 1, np.int32)
    padded[: stream.size] = stream
    counted = np.arange(count * context) < stream.size - 1
    shape = (count, context)
    return padded[:-1].reshape(shape), padded[1:].reshape(shape), counted.reshape(shape)


def _fill(rows: np.ndarray, count: int) -> np.ndarray:
    """Zero rows up to `count`, so that one compiled shape serves every batch."""
    return np.pad(rows, ((0, count - len(rows)), (0, 0)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `jax-gptq eval`."""
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="DIR", help="checkpoint folders, float or quantized"
    )
    parser.add_argument("--data", type=Path, required=True, help="UTF-8 text to predict")
    parser.add_argument("--context", type=int, help="tokens per window (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="activations"
    )


def run(args: argparse.Namespace) -> int:
    """`jax-gptq eval`: one line per model.

    Bits per byte compare models whose tokenizers differ; perplexities do so only within one.
    """
    from jax_gptq.models.loading import load
    from jax_gptq.models.tokenizer import Tokenizer, read_text

    text = read_text(args.data)
    width = max(len(str(path)) for path in [*args.models, "model"])
    print(f"{'model':<{width}}  {'tokens':>8}  {'perplexity':>10}  {'bits/byte':>9}  {'loss':>7}")
    for path in args.models:
        tokens = Tokenizer(path).encode(text)
        model = load(path, dtype=jnp.dtype(args.dtype))
        loss = mean_loss(model, tokens, context=args.context, batch_size=args.batch_size)
        bits = loss * (len(tokens) - 1) / len(text.encode()) / math.log(2)
        print(
            f"{path!s:<{width}}  {len(tokens):>8}  {math.exp(loss):>10.3f}  {bits:>9.4f}  "
            f"{loss:>7.4f}",
            flush=True,
        )
    return 0
