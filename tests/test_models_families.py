"""Each model family against transformers, on small random models: logits and generated tokens."""

import numpy as np
import pytest
from hf_models import save_quantized
from oracle import rel_error

import jax_gptq

transformers = pytest.importorskip("transformers", reason="compares with transformers")
torch = pytest.importorskip("torch", reason="compares with transformers")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=None,
    pad_token_id=0,
    bos_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN_ROPE = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32
)
GEMMA3_ROPE = dict(
    full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
FAMILIES = {
    "llama2": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama3.1": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE)),
    "llama_biased": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "llama_linear": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=7, head_dim=32)),
    "qwen2": ("Qwen2Config", dict(rope_parameters=YARN_ROPE, tie_word_embeddings=True)),
    "qwen2_window": (
        "Qwen2Config",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", dict(head_dim=32)),
    "gemma2": (
        "Gemma2Config",
        dict(
            head_dim=32,
            sliding_window=6,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            head_dim=32,
            sliding_window=6,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=GEMMA3_ROPE,
        ),
    ),
    "gpt2": ("GPT2Config", dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)),
}


def make(family: str):
    """A random transformers model whose norms, biases and softcaps all matter."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**COMMON, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    for parameter in model.parameters():  # ones, zeros and 0.02 would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family, options -> (transformers model, folder), made once."""
    made = {}

    def get(family: str, **options):
        key = family, tuple(options.items())
        if key not in made:
            model, folder = make(family), tmp_path_factory.mktemp("model")
            save_quantized(model, folder, **options)
            made[key] = model, folder
        return made[key]

    return get


@pytest.fixture(scope="module")
def loaded(saved):
    """family -> (transformers model, ours with f32 activations), loaded once."""
    made = {}

    def get(family: str):
        if family not in made:
            model, folder = saved(family)
            made[family] = model, jax_gptq.models.load(folder, dtype="float32")
        return made[family]

    return get


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, loaded):
    model, ours = loaded(family)
    ids = np.random.default_rng(1).integers(0, 128, (2, 40))
    assert rel_error(ours(ids), their_logits(model, ids)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, loaded):
    """The cache, step by step, gives what whole sequences give."""
    model, ours = loaded(family)
    ids = np.random.default_rng(2).integers(0, 128, (1, 12))
    tokens = np.asarray(ours.generate(ids, max_new_tokens=20))
    whole = np.concatenate([ids, tokens], axis=1)
    logits = their_logits(model, whole)[0, 11:-1]
    best = logits.max(-1)
    assert (best - logits[np.arange(20), tokens[0]] < 1e-4 * np.abs(best)).all()


@pytest.mark.parametrize(
    "family, layout",
    [("llama2", None), ("llama2", "reference"), ("qwen3", "dense"), ("gpt2", None)],
)
def test_act_order(family, layout, saved):
    model, folder = saved(family, desc_act=True, bits=8, seed=3)
    ids = np.random.default_rng(4).integers(0, 128, (2, 9))
    ours = jax_gptq.models.load(folder, dtype="float32", layout=layout)
    assert rel_error(ours(ids), their_logits(model, ids)) < 1e-5


def test_folded_act_order(saved):
    model, folder = saved("llama2", desc_act=True, bits=8, seed=3)
    ids = np.random.default_rng(5).integers(0, 128, (2, 9))
    ours = jax_gptq.models.load(folder, dtype="float32", layout="reference", fold_act_order=True)
    for name, layer in jax_gptq.models.linears(ours).items():
        if name.endswith("down_proj"):
            assert layer.weight.get_value().g_idx is None
    assert ours.folded_act_order
    assert rel_error(ours(ids), their_logits(model, ids)) < 1e-5


@pytest.mark.parametrize("family", ["llama2", "gemma3", "gpt2"])
def test_float_checkpoint(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(6).integers(0, 128, (2, 9))
    ours = jax_gptq.models.load(tmp_path, dtype="float32")
    assert rel_error(ours(ids), their_logits(model, ids)) < 1e-5
    stored = {name: value.numpy() for name, value in model.state_dict().items()}
    for name, tensor in jax_gptq.models.float_tensors(ours):
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)


def test_gpt2_without_prefix(tmp_path):
    """The original GPT-2 files name their tensors from the backbone on."""
    model = make("gpt2")
    model.transformer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    ids = np.random.default_rng(7).integers(0, 128, (1, 9))
    ours = jax_gptq.models.load(tmp_path, dtype="float32")
    assert rel_error(ours(ids), their_logits(model, ids)) < 1e-5
