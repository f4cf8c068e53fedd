"""Files that we write, read by GPTQModel's own loader, where that package is installed."""

import json

import numpy as np
import pytest
import tokenizers
from oracle import random_weight, rel_error

import jax_gptq

HIDDEN, INTER, VOCAB = 64, 128, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTER),
    "mlp.up_proj": (HIDDEN, INTER),
    "mlp.down_proj": (INTER, HIDDEN),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "checkpoint_format", "options"),
    [
        (4, "gptq", {"sym": True}),
        (4, "gptq_v2", {"g_idx": "random"}),
        (3, "gptq_v2", {}),
        (2, "gptq_v2", {"group_size": 64}),
        (5, "gptq_p", {}),
    ],
)
def test_gptqmodel_reads_our_files(tmp_path, bits, checkpoint_format, options):
    gptqmodel = pytest.importorskip("gptqmodel", reason="GPTQModel is not installed")
    rng = np.random.default_rng(bits)
    options = {"group_size": 32} | options
    weights, matrices, others = {}, {}, {}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, (k, n) in LINEARS.items():
            if (layer, name) == (0, "mlp.down_proj"):  # left dense: a "-:" rule
                others[f"{prefix}.{name}.weight"] = rng.normal(size=(n, k)).astype(np.float16)
                continue
            own = bits if (layer, name) != (1, "mlp.up_proj") else 4  # a "+:" rule
            weight, matrix = random_weight(rng, k, n, bits=own, **options)
            weights[f"{prefix}.{name}"], matrices[f"{prefix}.{name}"] = weight, matrix
        for norm in ("input_layernorm", "post_attention_layernorm"):
            others[f"{prefix}.{norm}.weight"] = np.ones(HIDDEN, np.float16)
    others["model.norm.weight"] = np.ones(HIDDEN, np.float16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        others[name] = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float16)
    jax_gptq.save_weights(
        weights,
        tmp_path,
        checkpoint_format=checkpoint_format,
        other_tensors=others,
        config=CONFIG,
        max_shard_size=60_000,
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0")).save(
        str(tmp_path / "tokenizer.json")
    )
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))

    model = gptqmodel.GPTQModel.load(
        str(tmp_path), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH
    ).model
    modules = dict(model.named_modules())
    for name, matrix in matrices.items():
        found = modules[name].dequantize_weight().float().numpy()
        if found.shape != matrix.shape:
            found = found.T
        assert rel_error(found, matrix) < 3e-3, name  # GPTQModel dequantizes to bfloat16
    dense = modules["model.layers.0.mlp.down_proj"].weight.float().detach().numpy()
    assert rel_error(dense, others["model.layers.0.mlp.down_proj.weight"]) < 3e-3
