"""Trains the embedded model from nothing: `python train.py OUT`, an hour on one core.

Collects the text (`corpus.py`), trains a byte-level BPE tokenizer, trains the decoder (`model.py`)
and writes OUT as a Hugging Face folder in f16, beside `held_back.txt` and `train.txt`, the two
sides of the text. A run that was stopped goes on from OUT/training.npz. Batches depend on the
seed and the step alone, and the learning rate is constant until the last `--decay` steps, so a run
stopped before its decay continues exactly as a shorter run would have.
"""

import argparse
import functools
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import ModelConfig, checkpoint_tensors, init, loss
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = corpus.split()
    tokenizer = train_tokenizer(train_texts, args.vocab)
    train, held = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    print(f"{len(train)} tokens to train on, {len(held)} held back", flush=True)
    (args.out / "train.txt").write_text("\n\n".join(train_texts) + "\n")
    (args.out / "held_back.txt").write_text("\n\n".join(held_texts) + "\n")

    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_hidden_layers=args.layers,
        max_position_embeddings=args.length,
    )
    params = init(config, jax.random.key(args.seed))
    print(f"{sum(p.size for p in params.values())} parameters", flush=True)
    optimizer = make_optimizer(params, args)
    state = optimizer.init(params)
    start = 0
    saved = args.out / "training.npz"
    if saved.exists():
        params, state, start = _restore(saved, params, state)
        print(f"continuing at step {start}", flush=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, batch):
        value, gradients = jax.value_and_grad(loss)(params, batch, config)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    held_loss = jax.jit(functools.partial(loss, config=config))
    began, recent = time.time(), []
    for step in range(start, args.steps):
        batch = sample(train, step, args)
        params, state, value = update(params, state, batch)
        recent.append(value)
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            mean = float(jnp.mean(jnp.stack(recent)))
            recent = []
            rate = (step + 1 - start) * args.batch * args.length / (time.time() - began)
            print(
                f"step {step + 1} loss {mean:.4f} "
                f"held back {evaluate(held_loss, params, held, args):.4f} {rate:.0f} tokens/s",
                flush=True,
            )
            _save(saved, params, state, step + 1)
            save_folder(args.out, params, config, tokenizer)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, as GPT-2: every text has an encoding, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents as one int32 stream, each followed by the end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*document.ids, end], np.int32) for document in encoded])


def make_optimizer(params, args) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the linears, Adam for embeddings and norms."""
    decay_from = args.steps - args.decay
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, 50),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, args.decay),
        ],
        [50, decay_from],
    )
    labels = {name: "muon" if "_proj" in name else "adam" for name in params}
    rules = {
        # consistent_rms gives every update the size of an Adam update (Liu et al. 2025).
        "muon": optax.contrib.muon(
            lambda step: args.rate * schedule(step),
            ns_steps=4,
            consistent_rms=0.2,
            weight_decay=0.1,
        ),
        "adam": optax.adam(lambda step: args.rate * schedule(step), b1=0.9, b2=0.98),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rules, labels))


def sample(tokens: np.ndarray, step: int, args) -> np.ndarray:
    """Windows [batch, length + 1] of one shuffled pass after another over the tokens.

    Every pass cuts the stream at another offset.
    """
    windows = (len(tokens) - 1) // args.length - 1
    first = step * args.batch
    rows = []
    for index in range(first, first + args.batch):
        rng = np.random.default_rng((args.seed, index // windows))
        offset = rng.integers(args.length)
        window = rng.permutation(windows)[index % windows]
        rows.append(tokens[offset + window * args.length :][: args.length + 1])
    return np.stack(rows)


def evaluate(held_loss, params, tokens: np.ndarray, args) -> float:
    """Mean loss over 64 windows spread evenly over the held-back tokens."""
    starts = np.linspace(0, len(tokens) - args.length - 1, 64).astype(int)
    cut = np.stack([tokens[start : start + args.length + 1] for start in starts])
    return float(np.mean([held_loss(params, cut[i : i + 8]) for i in range(0, 64, 8)]))


def save_folder(out: Path, params, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The folder as Hugging Face lays it out."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    save_file(checkpoint_tensors(params), out / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": end,
            "eos_token_id": end,
            "torch_dtype": "float16",
        },
    )
    _write_json(out / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    packages = ", ".join(f"{p} {version(p)} ({c})" for p, c in corpus.PACKAGES.items())
    (out / "README.md").write_text(
        _CARD.format(python=platform.python_version(), packages=packages)
    )


_CARD = """\
A small Llama decoder that writes the English of Python's documentation.

Text: docstrings, block comments and `pydoc` topics of CPython {python}'s standard library,
copyright Python Software Foundation and the modules' authors, PSF License Version 2
(https://docs.python.org/3/license.html), and docstrings and block comments of
{packages}, copyright their authors.
Made by `benchmarks/embedded/train.py` of jax_gptq; the weights are under the Apache License 2.0.
It is a demonstration: what it says is often untrue.
"""


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _save(path: Path, params, state, step: int) -> None:
    leaves = jax.tree.leaves((params, state))
    part = path.with_suffix(".part.npz")
    np.savez(part, *map(np.asarray, leaves), step=step)
    part.replace(path)


def _restore(path: Path, params, state):
    with np.load(path) as saved:
        leaves, tree = jax.tree.flatten((params, state))
        loaded = [jnp.asarray(saved[f"arr_{i}"], leaf.dtype) for i, leaf in enumerate(leaves)]
        return *jax.tree.unflatten(tree, loaded), int(saved["step"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--decay", type=int, default=500, help="last steps, rate falling to zero")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--report", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
