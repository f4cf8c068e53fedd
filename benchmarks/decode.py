"""A whole model on the host: tokens per second beside the memory floor, and prefill.

    python benchmarks/decode.py [--layers 28] [--rounds 5] [--folder DIR]

Writes a synthetic checkpoint of Qwen2.5-1.5B's shape (4 bits, group size 128, symmetric, random
codes), loads it with `jax_gptq.models.load` and times, in turn, round after round:

- the floor: reading all bytes that a token touches (packed weights, scales, output head) once;
- decoding at batch 1 through `model.generate`, with bfloat16 and float32 activations, and with
  bfloat16 and float32 after `round_head` (8 bits) and `fuse_projections`;
- the same with llama.cpp where `llama-cpp-python` and `gguf` are installed: a Q4_0 file of the same
  shape, its output head in Q6_K as llama.cpp's own quantizer has it (ours is stored in bfloat16,
  so that without `round_head` a token of ours touches more bytes);
- a prompt of 512 tokens, on the first layers only, beside the same layers dense in float32 (the
  `dense` layout: XLA's own dots).

What is reported is the median over the rounds, and of the ratios within a round. Writes
benchmarks/results/decode.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from cpu_matmul import RESULTS, THREADS, cpu_name
from flax import nnx

import jax_gptq
from jax_gptq import ffi
from jax_gptq.models import fuse_projections
from jax_gptq.quantize import round_head

GROUP = 128
PROMPT = 512
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def matrices(config: dict) -> dict[str, tuple[int, int]]:
    """Name within a layer -> (in_features, out_features)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def make_checkpoint(folder: Path, config: dict) -> None:
    """Random weights, one matrix in memory at a time."""
    rng = np.random.default_rng(0)
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    shapes = matrices(config)

    def weights() -> Iterator[tuple[str, jax_gptq.GptqWeight]]:
        for layer in layers:
            for name, (k, n) in shapes.items():
                words = rng.integers(0, 2**32, (k // 8, n), dtype=np.uint32)
                scales = rng.uniform(0.5, 1.5, (k // GROUP, n)) * 0.2 / np.sqrt(k)
                zeros = np.full((k // GROUP, n), 8, np.uint8)
                yield (
                    f"{layer}.{name}",
                    jax_gptq.GptqWeight(
                        jnp.asarray(words),
                        jnp.asarray(scales.astype(np.float16)),
                        jnp.asarray(zeros),
                        None,
                        *(4, GROUP, k, n),
                    ),
                )

    hidden = config["hidden_size"]
    table = rng.standard_normal((config["vocab_size"], hidden), dtype=np.float32)
    ones = np.ones(hidden, ml_dtypes.bfloat16)
    others = {
        "model.embed_tokens.weight": table.astype(ml_dtypes.bfloat16),
        "model.norm.weight": ones,
    }
    for layer in layers:
        others[f"{layer}.input_layernorm.weight"] = ones
        others[f"{layer}.post_attention_layernorm.weight"] = ones
    biases = {
        f"{layer}.self_attn.{name}": np.ones(shapes[f"self_attn.{name}"][1], np.float16)
        for layer in layers
        for name in ("q_proj", "k_proj", "v_proj")
    }
    jax_gptq.save_weights(weights(), folder, other_tensors=others, biases=biases, config=config)


def make_gguf(path: Path, config: dict) -> None:
    """Random blocks in llama.cpp's file format; no tokenizer."""
    import gguf

    rng = np.random.default_rng(0)
    formats = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def add(name: str, k: int, n: int, kind: gguf.GGMLQuantizationType) -> None:
        """Random codes; the one f16 scale of each block is small."""
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (n, k // values, size), dtype=np.uint8)
        scale = np.array([0.1 / np.sqrt(k)], np.float16).view(np.uint8)
        at = 0 if kind == formats.Q4_0 else size - 2
        blocks[..., at : at + 2] = scale
        writer.add_tensor(name, blocks.reshape(n, -1), raw_dtype=kind)

    hidden = config["hidden_size"]
    ones = np.ones(hidden, np.float32)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    add("token_embd.weight", hidden, config["vocab_size"], formats.Q6_K)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(config["num_hidden_layers"]):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
        for name, (k, n) in matrices(config).items():
            add(f"blk.{i}.{names[name]}.weight", k, n, formats.Q4_0)
            if names[name] in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{i}.{names[name]}.bias", np.ones(n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path: Path) -> Callable[[int], None]:
    """A function that decodes so many tokens, greedily, after a prompt of 8."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = 512
    options.n_threads = options.n_threads_batch = THREADS

    def decode(count: int) -> None:
        context = llama_cpp.llama_init_from_model(model, options)
        tokens = prompt(8)[0].tolist()
        for _ in range(count):
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            tokens = [int(np.ctypeslib.as_array(logits, (CONFIG["vocab_size"],)).argmax())]
        llama_cpp.llama_free(context)

    decode.keep = quiet
    return decode


def touched_bytes(model: jax_gptq.models.CausalLM) -> int:
    """What one token reads: every array of the model once, the embedding only as the head."""
    every = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    embedding = model.model.embed_tokens
    return every if model.head is embedding else every - embedding.weight[...].nbytes


def reader(count: int) -> Callable[[], None]:
    """Reads `count` bytes once, on all cores, in long stretches."""
    parts = np.array_split(np.ones(count // 8, np.uint64), THREADS)
    pool = ThreadPoolExecutor(THREADS)

    def read() -> None:
        list(pool.map(np.bitwise_or.reduce, parts))

    return read


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def prompt(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (1, count))


def measure_decode(
    folder: Path, rounds: int, tokens: int, peer: Callable[[int], None] | None
) -> list[dict]:
    """Seconds per token: a long answer less a short one, so that the prompt does not count."""
    models = {name: jax_gptq.models.load(folder, dtype=name) for name in ("bfloat16", "float32")}
    for name in list(models):
        quick = round_head(models[name])
        fuse_projections(quick)
        models[f"{name}, 8-bit head, fused"] = quick
    reads = {name: reader(touched_bytes(model)) for name, model in models.items()}
    ids = prompt(8)

    def answer(name: str, count: int) -> float:
        return seconds(lambda: models[name].generate(ids, max_new_tokens=count, stop_tokens=()))

    results = []
    for name, model in models.items():
        for count in (2, tokens + 2):  # compiles
            answer(name, count)
        ours, floor, theirs = [], [], []
        for _ in range(rounds):
            floor.append(min(seconds(reads[name]) for _ in range(3)))
            ours.append((answer(name, tokens + 2) - answer(name, 2)) / tokens)
            if peer is not None:
                long, short = seconds(lambda: peer(tokens + 2)), seconds(lambda: peer(2))
                theirs.append((long - short) / tokens)
        ratios = [f / o for f, o in zip(floor, ours)]
        times = [t / o for t, o in zip(theirs, ours)]
        results.append(
            {
                "model": name,
                "bytes_per_token": touched_bytes(model),
                "tokens_per_second": 1 / statistics.median(ours),
                "floor_tokens_per_second": 1 / statistics.median(floor),
                "fraction_of_floor": statistics.median(ratios),
                "fractions": ratios,
                "llama_cpp_q4_0_tokens_per_second": 1 / statistics.median(theirs)
                if times
                else None,
                "times_as_fast_as_llama_cpp": statistics.median(times) if times else None,
            }
        )
    return results


def measure_prefill(folder: Path, rounds: int) -> dict:
    """Seconds for a prompt and one token: packed against dense, both with f32 activations."""
    models = {
        layout: jax_gptq.models.load(folder, dtype="float32", layout=layout)
        for layout in ("cpu", "dense")
    }
    ids = prompt(PROMPT)
    times: dict[str, list[float]] = {layout: [] for layout in models}
    for i in range(rounds + 1):
        for layout, model in models.items():
            taken = seconds(partial(model.generate, ids, max_new_tokens=1))
            if i:  # the first round compiles
                times[layout].append(taken)
    ratios = [d / p for d, p in zip(times["dense"], times["cpu"])]
    return {
        "tokens": PROMPT,
        "packed_seconds": statistics.median(times["cpu"]),
        "dense_f32_seconds": statistics.median(times["dense"]),
        "times_faster_than_dense": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--prefill-layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="timed per round")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        folders = {}
        for count in (args.layers, args.prefill_layers):
            folders[count] = root / f"qwen2.5-1.5b-{count}-layers"
            if not (folders[count] / "config.json").exists():
                make_checkpoint(folders[count], {**CONFIG, "num_hidden_layers": count})
        peer = None
        if all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
            path = root / f"qwen2.5-1.5b-{args.layers}-layers.gguf"
            if not path.exists():
                make_gguf(path, {**CONFIG, "num_hidden_layers": args.layers})
            peer = llama_cpp(path)
        result = {
            "machine": {
                "cpu": cpu_name(),
                "threads": THREADS,
                "kernel": ffi.load("cpu").kernel(),
                "jax": jax.__version__,
                "load_average": os.getloadavg()[0],  # above `threads`: others ran beside it
            },
            "layers": args.layers,
            "decode": measure_decode(folders[args.layers], args.rounds, args.tokens, peer),
            "prefill_layers": args.prefill_layers,
            "prefill": measure_prefill(folders[args.prefill_layers], args.rounds),
        }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
