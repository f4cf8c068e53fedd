"""`jax-gptq generate`: text from a checkpoint folder, streamed as it comes."""

import argparse
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_gptq.errors import ModelError
from jax_gptq.models.embedded import embedded_path
from jax_gptq.models.generation import stream
from jax_gptq.models.loading import DTYPES, load
from jax_gptq.models.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jax-gptq generate`."""
    parser.add_argument(
        "path", nargs="?", help="checkpoint folder (default: the small model in this package)"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue or to answer")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations")
    parser.add_argument(
        "--raw", action="store_true", help="no chat template: continue the prompt as it is"
    )


def run(args: argparse.Namespace) -> int:
    """Stream the text to stdout; the tokens per second go to stderr."""
    path = args.path or embedded_path()
    tokenizer = Tokenizer(path)
    model = load(path, dtype=jnp.dtype(args.dtype))
    chat = tokenizer.chat_template is not None and not args.raw
    if chat:
        prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    else:
        prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise ModelError("--prompt: expected at least one token, found none")
    times = [time.perf_counter()]
    pieces = stream(
        model,
        np.asarray([prompt]),
        None,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        jax.random.key(args.seed),
    )
    if not chat:
        print(args.prompt, end="", flush=True)
    for text in tokenizer.decode_stream(_timed(pieces, times)):
        print(text, end="", flush=True)
    print()
    print(_speed(len(prompt), times), file=sys.stderr)
    return 0


def _timed(pieces: Iterator[np.ndarray], times: list[float]) -> Iterator[int]:
    """The tokens of the only row, noting when each came."""
    for piece in pieces:
        times.extend([time.perf_counter()] * piece.shape[1])
        yield from piece[0].tolist()


def _speed(prompt: int, times: list[float]) -> str:
    """The first two tokens wait for compilation; the others tell the speed."""
    start, *tokens = times
    text = f"{prompt} prompt tokens, {len(tokens)} new; first after {tokens[0] - start:.2f} s"
    if len(tokens) < 4:
        return text
    return f"{text}; {(len(tokens) - 2) / (tokens[-1] - tokens[1]):.1f} tokens/second after it"
