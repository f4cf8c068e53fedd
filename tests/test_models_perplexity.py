"""Perplexity against float64 NumPy, window by window."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_gptq.errors import ModelError
from jax_gptq.models.perplexity import mean_loss, perplexity

VOCAB = 11


class Bigram(nnx.Module):
    """Logits from the current token and the position: shows where each window starts."""

    def __init__(self, seed: int):
        keys = jax.random.split(jax.random.key(seed))
        self.table = nnx.Param(jax.random.normal(keys[0], (VOCAB, VOCAB)))
        self.position = nnx.Param(jax.random.normal(keys[1], (64, VOCAB)))
        self.config = types.SimpleNamespace(max_positions=64, vocab_size=VOCAB)

    def __call__(self, tokens):
        return self.table[...][tokens] + self.position[: tokens.shape[1]]


def oracle(model: Bigram, tokens: np.ndarray, context: int) -> float:
    table = np.asarray(model.table[...], np.float64)
    position = np.asarray(model.position[...], np.float64)
    losses = []
    for i in range(1, len(tokens)):
        logits = table[tokens[i - 1]] + position[(i - 1) % context]
        losses.append(np.log(np.exp(logits).sum()) - logits[tokens[i]])
    return float(np.mean(losses))


@pytest.mark.parametrize(
    ("count", "context", "batch_size"),
    [(2, 8, 1), (8, 8, 3), (9, 8, 3), (10, 8, 1), (57, 8, 3), (150, 64, 4), (20, 1, 7)],
)
def test_every_token_is_predicted_once(count, context, batch_size):
    tokens = np.random.default_rng(count).integers(0, VOCAB, count)
    model = Bigram(count)
    found = mean_loss(model, tokens, context=context, batch_size=batch_size)
    assert found == pytest.approx(oracle(model, tokens, context), rel=1e-6)


def test_perplexity_is_the_exponential_and_takes_the_models_context():
    tokens = np.random.default_rng(0).integers(0, VOCAB, 150)
    model = Bigram(0)
    assert perplexity(model, tokens) == pytest.approx(np.exp(oracle(model, tokens, 64)), rel=1e-6)


def test_uniform_logits_give_the_vocabulary_size():
    model = Bigram(0)
    model.table[...] = jnp.zeros((VOCAB, VOCAB))
    model.position[...] = jnp.zeros((64, VOCAB))
    assert perplexity(model, np.arange(10) % VOCAB) == pytest.approx(VOCAB, rel=1e-6)


@pytest.mark.parametrize("tokens", [[], [3], [[1, 2]], [0.5, 1.0], [0, VOCAB], [-1, 2]], ids=str)
def test_bad_tokens_are_named_errors(tokens):
    with pytest.raises(ModelError, match="token"):
        perplexity(Bigram(0), np.array(tokens))


def test_bad_context_and_non_finite_logits_are_named_errors():
    model = Bigram(0)
    with pytest.raises(ModelError, match="context"):
        perplexity(model, np.arange(5), context=0)
    model.table[...] = jnp.full((VOCAB, VOCAB), jnp.nan)
    with pytest.raises(ModelError, match="finite"):
        perplexity(model, np.arange(5))
