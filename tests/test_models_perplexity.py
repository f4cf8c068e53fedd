"""Perplexity against float64 NumPy, window by window."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_gptq.cli import main
from jax_gptq.errors import ModelError
from jax_gptq.models import embedded_path
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


# English of the kind that the embedded model was trained on; no sentence is from that text.
TEXT = """\
If the file does not exist, an error is raised. The default is to return the value of the first
argument. This method is called when the object is no longer used, and it may be overridden in a
subclass.
"""


def test_command_line_shows_models_side_by_side(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    folder = str(embedded_path())
    assert main(["eval", folder, folder, "--data", str(text)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "tokens", "perplexity", "bits/byte", "loss"]
    assert len(lines) == 2 and lines[0] == lines[1]
    name, tokens, value, bits_per_byte, loss = lines[0].split()
    assert name == folder
    # An untrained model would be near its vocabulary of 2048.
    assert 1 < float(value) < 60
    assert float(loss) == pytest.approx(np.log(float(value)), abs=1e-3)
    bits = float(loss) * (int(tokens) - 1) / np.log(2)
    assert float(bits_per_byte) == pytest.approx(bits / len(TEXT), rel=1e-3)


def test_command_line_names_a_text_that_is_missing_or_not_utf8(tmp_path, capsys):
    assert main(["eval", str(embedded_path()), "--data", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert main(["eval", str(embedded_path()), "--data", str(latin)]) == 2
    assert "latin.txt: expected UTF-8 text, found byte 0xe9 at offset 3" in capsys.readouterr().err


def test_embedded_model_is_small():
    assert sum(file.stat().st_size for file in embedded_path().iterdir()) <= 3_000_000
