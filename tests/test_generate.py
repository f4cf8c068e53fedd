"""Generation: caches, batches, stopping, sampling, what is compiled and what the HLO holds."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from real_checkpoints import FOLDERS, needs_checkpoints

import jax_gptq
from jax_gptq import cli, errors
from jax_gptq.models import generation
from jax_gptq.models.config import from_hf
from jax_gptq.models.sampling import Sampler

VOCABULARY = 96


def make_model(**options):
    config = dict(
        model_type="mistral",
        sliding_window=20,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=7,
    )
    config = from_hf({**config, **options})
    model = jax_gptq.models.new_model(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    table = model.model.embed_tokens.weight
    table[...] = table[...] * 50  # greedy tokens that depend on the prompt
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompts(batch: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, count))


def greedy(model, ids: np.ndarray, count: int) -> np.ndarray:
    """Token by token, each from the whole sequence (in a frame of one size: what follows a token
    does not matter)."""
    start = ids.shape[1]
    frame = np.pad(ids, ((0, 0), (0, count)))
    for i in range(start, start + count):
        frame[:, i] = model(frame)[:, i - 1].argmax(-1)
    return frame[:, start:]


def test_greedy_equals_whole_sequences(model):
    ids = prompts(2, 13)
    tokens = model.generate(ids, max_new_tokens=12)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, greedy(model, ids, 12))
    assert len(np.unique(tokens)) > 4


def test_rows_of_unequal_length_equal_the_row_alone(model):
    ids, lengths = prompts(3, 17, seed=1), [17, 3, 16]
    together = model.generate(ids, lengths=lengths, max_new_tokens=9)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=9)
        np.testing.assert_array_equal(together[row], alone[0])
    poisoned = np.where(np.arange(17) < np.array(lengths)[:, None], ids, 5)
    np.testing.assert_array_equal(
        model.generate(poisoned, lengths=lengths, max_new_tokens=9), together
    )


def test_stop_tokens(model):
    ids = prompts(2, 6, seed=2)
    free = np.asarray(model.generate(ids, max_new_tokens=20))
    stop = int(free[0, 4])
    found = np.asarray(model.generate(ids, max_new_tokens=20, stop_tokens=[stop]))
    for row in range(2):
        hits = np.flatnonzero(free[row] == stop)
        end = hits[0] + 1 if len(hits) else 20
        np.testing.assert_array_equal(found[row, :end], free[row, :end])
        assert (found[row, end:] == 7).all()


def test_the_checkpoint_stops_by_itself():
    model = make_model(num_hidden_layers=1)
    stop = int(model.generate(prompts(1, 6), max_new_tokens=3)[0, 2])
    stopping = make_model(num_hidden_layers=1, eos_token_id=stop)
    np.testing.assert_array_equal(stopping.generate(prompts(1, 6), max_new_tokens=6)[0, 3:], 7)
    np.testing.assert_array_equal(
        stopping.generate(prompts(1, 6), max_new_tokens=6, stop_tokens=()),
        model.generate(prompts(1, 6), max_new_tokens=6),
    )


def test_compiled_once_per_bucket():
    model = make_model(num_hidden_layers=1)
    generation.prefill.clear_cache()
    generation.decode.clear_cache()
    key = jax.random.key(0)
    for count, new in [(3, 5), (9, 7), (16, 13), (5, 2)]:
        model.generate(prompts(1, count), max_new_tokens=new)
        model.generate(prompts(1, count), max_new_tokens=new, stop_tokens=[1])
    # Stop tokens: none, and one. Prompts of 3 to 16 tokens are one bucket; 16 + 13 needs the next.
    assert generation.prefill._cache_size() == 4
    assert generation.decode._cache_size() == 4
    for temperature, top_p in [(0.5, 0.9), (1.0, 0.5), (2.0, 0.1)]:
        model.generate(prompts(1, 9), None, 7, temperature, top_p=top_p, key=key)
    assert generation.prefill._cache_size() == 5
    assert generation.decode._cache_size() == 5


def test_a_stream_of_another_prompt_compiles_nothing(model):
    compilations = []

    def listener(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        list(generation.stream(model, prompts(3, 5), max_new_tokens=11))
        assert compilations
        compilations.clear()
        list(generation.stream(model, prompts(3, 6), max_new_tokens=10))
        assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_stream_hands_over_the_same_tokens(model):
    ids = prompts(2, 5, seed=3)
    expected = model.generate(ids, max_new_tokens=11)
    for chunk in (1, 4, None):
        pieces = list(generation.stream(model, ids, max_new_tokens=11, chunk=chunk))
        sizes = [piece.shape[1] for piece in pieces]
        assert sizes[0] == 1
        if chunk is None:
            assert all(size <= 2 * before for before, size in itertools.pairwise(sizes))
        else:
            assert max(sizes) == chunk
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    draws = 4000
    rows = jnp.tile(logits, (draws, 1))

    def frequencies(temperature, top_k=None, top_p=None):
        sampler = Sampler.make(draws, temperature, top_k, top_p, jax.random.key(1))
        return np.bincount(sampler(rows, jnp.int32(0)), minlength=4) / draws

    np.testing.assert_allclose(frequencies(1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    sharp = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(0.5), sharp / sharp.sum(), atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, top_k=9, top_p=0.4), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(0.0), [1, 0, 0, 0])


def test_greedy_takes_the_first_of_the_largest():
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (6, 1000)).astype(np.float32)  # many are equal
    logits[1] = -np.inf
    logits[2, 7] = np.inf
    logits[3] = rng.standard_normal(1000)
    sampler = Sampler.make(6, 0.0, None, None, None)
    tokens = jax.jit(sampler)(logits, jnp.int32(0))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    logits[4, 5] = np.nan
    with_nan = sampler(jnp.asarray(logits), jnp.int32(0))
    np.testing.assert_array_equal(np.delete(with_nan, 4), np.delete(tokens, 4))
    assert 0 <= with_nan[4] < 1000


def test_sampling_is_reproducible_and_row_by_row(model):
    ids = prompts(2, 6, seed=4)
    draw = dict(max_new_tokens=8, temperature=1.5, top_k=20, top_p=0.95)
    first = model.generate(ids, key=jax.random.key(3), **draw)
    np.testing.assert_array_equal(first, model.generate(ids, key=jax.random.key(3), **draw))
    assert (first != model.generate(ids, key=jax.random.key(4), **draw)).any()
    alone = model.generate(ids[:1], key=jax.random.key(3), **draw)
    np.testing.assert_array_equal(first[0], alone[0])


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=1.0), "key"),
        (dict(temperature=1.0, top_k=0), "top_k"),
        (dict(temperature=1.0, top_p=1.5), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(lengths=[3]), "lengths"),
        (dict(lengths=[0, 3]), "lengths"),
        (dict(lengths=[3, 7]), "lengths"),
        (dict(lengths=[3.0, 3.0]), "lengths"),
    ],
)
def test_bad_arguments(model, options, words):
    with pytest.raises(errors.ModelError, match=words):
        model.generate(prompts(2, 6), **options)


def test_bad_prompts_and_chunks(model):
    with pytest.raises(errors.ModelError, match="at least one token"):
        model.generate(np.zeros((1, 0), np.int32))
    with pytest.raises(errors.ModelError, match="at least one token"):
        model(np.zeros((0, 3), np.int32))
    with pytest.raises(errors.ModelError, match="32 bits, found 1 to 1099511627776"):
        model.generate([[1, 1 << 40]])
    with pytest.raises(errors.ModelError, match="chunk: expected at least 1, found 0"):
        list(generation.stream(model, prompts(1, 3), chunk=0))


def test_prompts_of_any_kind(model):
    """Lists, NumPy arrays of any integers, device arrays, lists of traced tokens."""
    ids = prompts(2, 5, seed=4)
    expected = model.generate(ids, max_new_tokens=4)
    for same in (ids.tolist(), ids.astype(np.int64), ids.astype(np.uint8), jnp.asarray(ids)):
        np.testing.assert_array_equal(model.generate(same, max_new_tokens=4), expected)
    logits = jax.jit(lambda first: model([[first, first]]))(3)
    np.testing.assert_allclose(logits, model([[3, 3]]), rtol=1e-5, atol=1e-5)


def test_pieces_are_small_and_stay_as_they_are(model):
    pieces = list(generation.stream(model, prompts(2, 5, seed=3), max_new_tokens=40, chunk=1))
    assert all(piece.base is None for piece in pieces)
    expected = model.generate(prompts(2, 5, seed=3), max_new_tokens=40)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected)


def test_gpt2_ends_at_its_last_position():
    config = dict(model_type="gpt2", vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    model = jax_gptq.models.new_model(from_hf(config), dtype=jnp.float32, rngs=nnx.Rngs(0))
    ids = np.zeros((1, 10), np.int32)
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=14), greedy(model, ids, 14))
    with pytest.raises(errors.ModelError, match="24 positions"):
        model.generate(ids, max_new_tokens=15)


def compiled_decode(model) -> str:
    """Optimized HLO of the token loop at batch 1."""
    leaves, structure = jax.tree.flatten(model)
    sampler, stop = Sampler.make(1, 0.0, None, None, None), jnp.zeros(0, jnp.int32)
    ids = jnp.zeros((1, 16), jnp.int32)
    progress = generation.prefill(
        structure, leaves, ids, jnp.array([5]), sampler, stop, slots=32, dtype=jnp.float32, pad=0
    )
    arguments = (structure, leaves, progress, sampler, stop, jnp.int32(9))
    return generation.decode.lower(*arguments, pad=0).compile().as_text()


HLO_TYPES = {"uint32": "u32", "uint8": "u8", "float16": "f16", "int32": "s32", "float32": "f32"}


@needs_checkpoints
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hlo_neither_copies_nor_embeds_weights(dtype):
    """Weights are loop-invariant arguments: only the matmul reads them, no other copy of the
    embedding is made, and the cache is updated in place."""
    folder = next(folder for folder in FOLDERS if folder.name == "llama_w4_g128_sym_v1")
    model = jax_gptq.models.load(folder, dtype=dtype)
    hlo = compiled_decode(model)
    outside = re.sub(r"(?ms)^%fused_computation.*?^}", "", hlo)  # what becomes an array in memory
    assert not re.search(r"= \S+\[512,256\]\S* (fusion|convert|copy)\(", outside)
    for layer in jax_gptq.models.linears(model).values():
        if not isinstance(layer, jax_gptq.nnx.GptqLinear):
            continue
        for leaf in jax.tree.leaves(layer.weight.get_value()):
            if leaf.size < 4096:
                continue
            shape = f"{HLO_TYPES[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]"
            made_by = set(re.findall(rf"= {re.escape(shape)}\S* ([a-z-]+)\(", hlo))
            assert made_by
            assert made_by <= {"parameter", "get-tuple-element", "bitcast"}, (shape, made_by)
    cache = "f32[2,32,64]"
    made_by = re.findall(rf"= {re.escape(cache)}\S* ([a-z-]+)\(", hlo)
    assert made_by.count("dynamic-update-slice") == 4  # keys and values of two layers
    assert set(made_by) <= {"parameter", "get-tuple-element", "dynamic-update-slice", "fusion"}
    sizes = [
        np.prod([int(d or 1) for d in dims.split(",")])
        for dims in re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", hlo)
    ]
    assert max(sizes) < 4096


def test_command_line_runs_the_embedded_model(capfd):
    """Without a path, offline: readable words."""
    prompt = ["--prompt", "Return the number of"]
    assert cli.main(["generate", *prompt, "--max-new-tokens", "12"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Return the number of ")
    words = re.findall("[a-z]+", out.removeprefix("Return the number of"))
    assert len(words) >= 3
    assert "tokens/second" in err


@needs_checkpoints
def test_command_line(tmp_path, capfd):
    folder = str(next(folder for folder in FOLDERS if folder.name == "llama_w4_g128_sym_v1"))
    options = ["--prompt", "a b", "--max-new-tokens", "6"]
    assert cli.main(["generate", folder, *options]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("a b") and out.endswith("\n")
    assert "6 new" in err and "tokens/second" in err
    assert cli.main(["generate", folder, *options, "--temperature", "1", "--top-p", "2"]) == 2
    assert "top_p" in capfd.readouterr().err
    assert cli.main(["generate", str(tmp_path), *options]) == 2
    assert "tokenizer.json" in capfd.readouterr().err
