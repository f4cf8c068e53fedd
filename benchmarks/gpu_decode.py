"""A whole 4-bit model on a GPU: tokens per second of a Llama-3.1-8B shape, and its memory floor.

    python benchmarks/gpu_decode.py [--batches 1,4,16,32] [--tokens 128] [--layers 32]

The weights are random and made on the device (group size 128, asymmetric zero points, bf16 scales;
embedding and output head in bfloat16), so the text is nonsense, but every byte is read. Timed is
`model.generate` from a prompt of 8 tokens, prefill included, compilation not; then the same after
`fuse_projections`, and after `round_head` too (8 bits). The floor reads every packed weight and the
head once per step at the copy bandwidth that was measured just before.

Writes benchmarks/results/gpu_decode.json. Needs a GPU, and the package built with CUDA.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_matmul import GROUP, RESULTS, ceilings, driver_version

from jax_gptq import ffi
from jax_gptq.linear import GptqLinear
from jax_gptq.models import CausalLM, fuse_projections
from jax_gptq.models.config import from_hf
from jax_gptq.models.layers import Embedding, QuantizedLinear, RMSNorm
from jax_gptq.models.loading import new_model
from jax_gptq.models.naming import linears, set_layer
from jax_gptq.quantize import round_head
from jax_gptq.stores.cuda import CudaStore

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
PROMPT = 8


def random_store(key: jax.Array, k: int, n: int) -> CudaStore:
    keys = jax.random.split(key, 3)
    tiles, groups = -(-n // 64), -(-k // GROUP)
    return CudaStore(
        jax.random.bits(keys[0], (tiles, k // 64, 4, 32, 4), jnp.uint32),
        jax.random.uniform(keys[1], (tiles, groups, 64), jnp.bfloat16, 0.001, 0.005),
        jax.random.randint(keys[2], (tiles, groups, 64), 4, 12).astype(jnp.uint8),
        None,
        4,
        GROUP,
        k,
        n,
    )


def random_model(layers: int) -> CausalLM:
    config = from_hf({**CONFIG, "num_hidden_layers": layers})
    model = nnx.eval_shape(lambda: new_model(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    key = jax.random.key(0)

    def normal(shape):
        nonlocal key
        key, use = jax.random.split(key)
        return nnx.Param(jax.random.normal(use, shape, jnp.bfloat16) * 0.02)

    for _, module in nnx.iter_modules(model):
        if isinstance(module, RMSNorm):
            module.weight = nnx.Param(jnp.ones(module.weight.shape, jnp.bfloat16))
        elif isinstance(module, Embedding):
            module.weight = normal(module.weight.shape)
    make = jax.jit(random_store, static_argnums=(1, 2))
    for name, layer in linears(model).items():
        key, use = jax.random.split(key)
        store = make(use, layer.in_features, layer.out_features)
        set_layer(model, name, QuantizedLinear.from_linear(GptqLinear(store)))
    return model


def bytes_read(model: CausalLM) -> int:
    """By one step: the packed weights and the head, which may be one of them."""
    stores = {name: layer.weight.get_value() for name, layer in linears(model).items()}
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(stores))
    return read + (model.head.weight[...].nbytes if isinstance(model.head, Embedding) else 0)


def generate_seconds(model: CausalLM, batch: int, tokens: int) -> float:
    """The least of two runs, after one that compiles."""
    prompt = jax.random.randint(jax.random.key(batch), (batch, PROMPT), 0, 1000)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, stop_tokens=()).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,4,16,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_decode.json")
    args = parser.parse_args()
    if jax.default_backend() != "gpu" or not ffi.has("cuda"):
        parser.error("needs a GPU and jax_gptq built with CUDA")
    limits = ceilings()
    model = random_model(args.layers)
    data = {
        "device": jax.devices()[0].device_kind,
        "driver": driver_version(),
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "model": "Llama-3.1-8B shape, 4 bits, group 128, random weights",
        "layers": args.layers,
        "ceilings": limits,
        "results": [],
    }
    batches = [int(batch) for batch in args.batches.split(",")]
    for variant in ("as loaded", "fused projections", "fused projections, 8-bit head"):
        if variant == "fused projections":
            fuse_projections(model)
        elif variant != "as loaded":
            model = round_head(model)
        read = bytes_read(model)
        floor_us = read / limits["copy GB/s"] / 1e3
        for batch in batches:
            seconds = generate_seconds(model, batch, args.tokens)
            result = {
                "batch": batch,
                "model": variant,
                "bytes read per step": read,
                "tokens per second": round(batch * args.tokens / seconds, 1),
                "microseconds per step": round(seconds / args.tokens * 1e6),
                "floor microseconds per step": round(floor_us),
                "floor tokens per second": round(batch * 1e6 / floor_us),
            }
            data["results"].append(result)
            print(result, flush=True)
            args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
