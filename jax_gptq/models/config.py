"""`config.json` of Hugging Face, whatever family wrote it -> one `DecoderConfig`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax_gptq.errors import ConfigError, MissingFileError, ModelError
from jax_gptq.models.rope import RopeConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What differs from block to block.

    Attributes:
      window: a query sees this many positions, its own included; None: all before it.
      rope: rotary embedding; None where positions are learned.
    """

    window: int | None = None
    rope: RopeConfig | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder-only family from another.

    Attributes:
      model_type: as in config.json; "gpt2" has its own blocks, all others share one.
      layers: one `LayerConfig` per block.
      norm_unit_offset: RMSNorm multiplies by 1 + weight (Gemma).
      post_norms: a norm after attention and MLP too, before each residual sum (Gemma 2 and 3).
      qk_norm: RMSNorm of each head's query and key before rope (Qwen3, Gemma 3).
      embedding_scale: factor on token embeddings, or None.
      attention_scale: factor on query-key products.
      attention_softcap, logits_softcap: c in c * tanh(x / c), or None.
      tie_embeddings: the output head is the embedding table.
      stop_tokens: the checkpoint's end-of-sequence tokens.
      pad_token: fills rows after their stop token.
      hf: config.json as it was read.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    layers: tuple[LayerConfig, ...]
    attention_scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    norm_unit_offset: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    tie_embeddings: bool = False
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    hf: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def to_hf(self) -> dict[str, Any]:
        """A copy of the config.json that this was read from."""
        return json.loads(json.dumps(self.hf))


def read_config(path: str | Path) -> DecoderConfig:
    """`config.json` of a checkpoint folder, with `generation_config.json`'s stop tokens.

    Raises:
      MissingFileError: no config.json there.
      ConfigError: it is not JSON, or a value cannot be used.
      ModelError: an unknown model_type or rope type.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise MissingFileError(f"{file}: expected the model's configuration, found no such file")
    hf = _read_json(file)
    generation = folder / "generation_config.json"
    stop = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    return from_hf(hf if stop is None else {**hf, "eos_token_id": stop})


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The content of a config.json -> `DecoderConfig`. Raises ConfigError, ModelError."""
    model_type = hf.get("model_type")
    if model_type not in _FAMILIES:
        raise ModelError(
            f"config.json: model_type: expected one of {sorted(_FAMILIES)}, found {model_type!r}; "
            f"jax_gptq.load_linears reads the quantized layers of any model"
        )
    try:
        return _FAMILIES[model_type](hf)
    except KeyError as error:
        raise ConfigError(
            f"config.json: a {model_type} model needs {error.args[0]!r}, found no such key"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _rotary(hf: Mapping[str, Any], **family: Any) -> DecoderConfig:
    """What Llama, Mistral, Qwen and Gemma have in common; `family` overrides."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    common: dict[str, Any] = {
        "model_type": hf["model_type"],
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": _activation(hf.get("hidden_act", "silu")),
        "layers": (LayerConfig(None, _rope(hf)),) * hf["num_hidden_layers"],
        "attention_scale": head_dim**-0.5,
        "qkv_bias": bool(hf.get("attention_bias", False)),
        "out_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        **_shared(hf, tie_embeddings=False),
    }
    return DecoderConfig(**{**common, **family})


def _shared(hf: Mapping[str, Any], *, tie_embeddings: bool) -> dict[str, Any]:
    stop = hf.get("eos_token_id")
    stop = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
    pad = hf.get("pad_token_id")
    return {
        "tie_embeddings": bool(hf.get("tie_word_embeddings", tie_embeddings)),
        "stop_tokens": stop,
        "pad_token": pad if isinstance(pad, int) and pad >= 0 else 0,
        "hf": dict(hf),
    }


def _llama(hf: Mapping[str, Any]) -> DecoderConfig:
    return _rotary(hf)


def _mistral(hf: Mapping[str, Any]) -> DecoderConfig:
    layer = LayerConfig(hf.get("sliding_window"), _rope(hf))
    return _rotary(hf, layers=(layer,) * hf["num_hidden_layers"], qkv_bias=False, out_bias=False)


def _qwen(hf: Mapping[str, Any], **family: Any) -> DecoderConfig:
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 0)  # layers below it see everything
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention"
        for i in range(hf["num_hidden_layers"])
    ]
    return _rotary(hf, layers=_layers_of(hf, kinds, window, _rope(hf), _rope(hf)), **family)


def _qwen2(hf: Mapping[str, Any]) -> DecoderConfig:
    return _qwen(hf, qkv_bias=True, out_bias=False)


def _qwen3(hf: Mapping[str, Any]) -> DecoderConfig:
    return _qwen(hf, qk_norm=True)


def _gemma(hf: Mapping[str, Any], layers: tuple[LayerConfig, ...], **family: Any) -> DecoderConfig:
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    return _rotary(
        hf,
        layers=layers,
        activation=_activation(act),
        norm_unit_offset=True,
        post_norms=True,
        embedding_scale=hf["hidden_size"] ** 0.5,
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        logits_softcap=hf.get("final_logit_softcapping"),
        mlp_bias=False,
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
        **family,
    )


def _gemma2(hf: Mapping[str, Any]) -> DecoderConfig:
    kinds = hf.get("layer_types") or _every(hf["num_hidden_layers"], 2)
    rope = _rope(hf)
    return _gemma(hf, _layers_of(hf, kinds, hf.get("sliding_window", 4096), rope, rope))


def _gemma3(hf: Mapping[str, Any]) -> DecoderConfig:
    pattern = hf.get("sliding_window_pattern", 6)
    kinds = hf.get("layer_types") or _every(hf["num_hidden_layers"], pattern)
    full = _rope({"rope_theta": 1e6, **hf}, "full_attention")
    local = {
        "rope_parameters": hf.get("rope_parameters"),
        "rope_theta": hf.get("rope_local_base_freq", 1e4),
    }
    sliding = _rope({**hf, "rope_scaling": None, **local}, "sliding_attention")
    layers = _layers_of(hf, kinds, hf.get("sliding_window", 4096), full, sliding)
    return _gemma(hf, layers, qk_norm=True)


def _every(count: int, pattern: int) -> list[str]:
    """Each `pattern`-th layer attends to everything, the others to a window."""
    return [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(count)
    ]


def _layers_of(hf, kinds, window, full: RopeConfig, sliding: RopeConfig) -> tuple[LayerConfig, ...]:
    if len(kinds) != hf["num_hidden_layers"]:
        raise ConfigError(
            f"config.json: layer_types: expected {hf['num_hidden_layers']} entries "
            f"(num_hidden_layers), found {len(kinds)}"
        )
    known = {
        "full_attention": LayerConfig(None, full),
        "sliding_attention": LayerConfig(window, sliding),
    }
    unknown = set(kinds) - set(known)
    if unknown:
        raise ModelError(
            f"config.json: layer_types: expected {sorted(known)}, found {sorted(unknown)}"
        )
    return tuple(known[kind] for kind in kinds)


def _rope(hf: Mapping[str, Any], layer_type: str | None = None) -> RopeConfig:
    """Rotary parameters: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    values = dict(hf.get("rope_parameters") or {})
    if layer_type in values:
        values = dict(values[layer_type])
    if not values:
        values = {"rope_theta": hf.get("rope_theta", 1e4), **(hf.get("rope_scaling") or {})}
    partial = values.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor: expected 1, found {partial}")
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return RopeConfig.from_hf(
        values, head_dim, hf.get("rope_theta", 1e4), hf.get("max_position_embeddings", 2048)
    )


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ModelError(
            f"config.json: hidden activation: expected one of {sorted(ACTIVATIONS)}, found {name!r}"
        )
    return ACTIVATIONS[name]


def _gpt2(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("scale_attn_by_inverse_layer_idx"):
        raise ModelError("config.json: scale_attn_by_inverse_layer_idx is not supported")
    hidden, heads = hf["n_embd"], hf["n_head"]
    return DecoderConfig(
        model_type="gpt2",
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hf.get("n_inner") or 4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=hf.get("n_positions", 1024),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_activation(hf.get("activation_function", "gelu_new")),
        layers=(LayerConfig(),) * hf["n_layer"],
        attention_scale=(hidden // heads) ** -0.5 if hf.get("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        **_shared(hf, tie_embeddings=True),
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}
