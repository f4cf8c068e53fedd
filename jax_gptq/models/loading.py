"""Checkpoint folders as Hugging Face lays them out -> models."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_gptq import host
from jax_gptq.checkpoint import open_checkpoint
from jax_gptq.errors import MissingTensorError, ModelError, ShapeError
from jax_gptq.linear import GptqLinear
from jax_gptq.models import act_order
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.config import DecoderConfig, read_config
from jax_gptq.models.decoder import Attention as RotaryAttention
from jax_gptq.models.decoder import Decoder, Mlp
from jax_gptq.models.gpt2 import GPT2
from jax_gptq.models.layers import Embedding, LayerNorm, QuantizedLinear, RMSNorm
from jax_gptq.models.naming import linears, set_layer
from jax_gptq.weight import GptqWeight

DTYPES = ("float32", "bfloat16", "float16")
# Tensors that some writers keep beside the weights and that no model needs.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_MLP = ("gate_proj", "up_proj", "down_proj")


def new_model(config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> CausalLM:
    """A model of `config`'s family with random float weights."""
    family = GPT2 if config.model_type == "gpt2" else Decoder
    return family(config, dtype=dtype, rngs=rngs)


def load(
    path: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    layout: str | None = None,
    fold_act_order: bool = False,
) -> CausalLM:
    """Load a checkpoint folder (config.json, safetensors), quantized or float.

    Args:
      path: the folder.
      dtype: of activations and float layers. Packed weights, their scales and biases, and norms
        stay as they were stored, and so do embeddings whose every value this dtype holds.
      layout: for `jax_gptq.prepare`; None: for the default device.
      fold_act_order: for inference, bake the act-order of each `down_proj` into the columns of
        gate and up, which saves its gather. Such a model cannot be saved.

    Returns:
      A `CausalLM` whose attribute paths are the checkpoint's module names. Quantized layers are
      `jax_gptq.nnx.GptqLinear`, others `flax.nnx.Linear`.

    Raises:
      ModelError: an unknown family or rope type, or a dtype that is none of DTYPES.
      MissingTensorError: a tensor that the model needs is in no file; fused projections
        (`qkv_proj`, `gate_up_proj`) are not split.
      ShapeError: a tensor has another shape than the configuration says.
      And what reading the checkpoint raises.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise ModelError(f"dtype: expected one of {DTYPES}, found {jnp.dtype(dtype).name}")
    config = read_config(path)
    reader = _Reader(path, config, dtype, layout)
    if config.tie_embeddings and reader.is_quantized("lm_head"):
        config = dataclasses.replace(config, tie_embeddings=False)
    model = nnx.eval_shape(lambda: new_model(config, dtype=dtype, rngs=nnx.Rngs(0)))
    model.folded_act_order = fold_act_order
    for module_path, module in list(nnx.iter_modules(model)):
        name = ".".join(map(str, module_path))
        if name == "lm_head" and reader.is_quantized(name):
            features = (config.hidden_size, config.vocab_size)
            set_layer(model, name, reader.prepared(*reader.weight(name, features, False)))
        elif isinstance(module, (RMSNorm, LayerNorm, Embedding)):
            reader.fill(name, module)
        elif isinstance(module, Mlp) and fold_act_order and reader.folds(name):
            for child, layer in reader.folded_mlp(name, module).items():
                set_layer(model, child, layer)
    for name, layer in linears(model).items():
        if isinstance(layer, nnx.Linear):
            if reader.is_quantized(name):
                set_layer(model, name, reader.prepared(*reader.layer_weight(name, layer)))
            else:
                reader.fill_linear(name, layer)
    share_act_orders(model)
    reader.warn_of_unused()
    return model


def share_act_orders(model: CausalLM) -> None:
    """Find the projections of one input that share an act-order (see `layers.project`)."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, RotaryAttention):
            act_order.share_act_order((module.q_proj, module.k_proj, module.v_proj), name)
        elif isinstance(module, Mlp):
            act_order.share_act_order((module.gate_proj, module.up_proj), name)


def float_tensors(model: CausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """Every float tensor, named and oriented as Hugging Face stores it, one at a time.

    Quantized layers are left out.
    """
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        if isinstance(module, nnx.Linear):
            conv1d = _is_conv1d(model.config)
            kernel = np.asarray(module.kernel[...])
            yield f"{name}.weight", kernel if conv1d else np.ascontiguousarray(kernel.T)
            if module.bias is not None:
                yield f"{name}.bias", np.asarray(module.bias[...])
        elif isinstance(module, (RMSNorm, LayerNorm, Embedding)):
            for child, value in _params(module):
                yield f"{name}.{child}", np.asarray(value[...])


def _params(module: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """The parameters of a norm or an embedding, by name."""
    for name in ("weight", "bias"):
        value = getattr(module, name, None)
        if isinstance(value, nnx.Param):
            yield name, value


def _is_conv1d(config: DecoderConfig) -> bool:
    """GPT-2 keeps its matrices as [in, out]."""
    return config.model_type == "gpt2"


class _Reader:
    """Hands the tensors of a checkpoint to the layers of a model, and remembers which it used."""

    def __init__(self, path: str | Path, config: DecoderConfig, dtype, layout: str | None):
        self.checkpoint = open_checkpoint(path)
        self.path = path
        self.config = config
        self.dtype = dtype
        self.layout = layout
        self.quantized = set(self.checkpoint.quantized_modules())
        self.used: set[str] = set()
        # Some writers leave out, or add to, the prefix of everything but the head.
        embedding = "wte.weight" if config.model_type == "gpt2" else "embed_tokens.weight"
        self.prefix = "transformer." if config.model_type == "gpt2" else "model."
        found = [n for n in self.checkpoint.names() if f".{n}".endswith(f".{embedding}")]
        self.file_prefix = found[0].removesuffix(embedding) if len(found) == 1 else self.prefix

    def file_name(self, name: str) -> str:
        """A name in the model -> the name in the files."""
        if not name.startswith(self.prefix):
            return name
        return self.file_prefix + name.removeprefix(self.prefix)

    def is_quantized(self, name: str) -> bool:
        return self.file_name(name) in self.quantized

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A mapped tensor of that shape. Raises MissingTensorError, ShapeError."""
        file_name = self.file_name(name)
        if file_name not in self.checkpoint:
            raise MissingTensorError(
                f"{self.path}: expected tensor {file_name!r}, found in no file of this checkpoint; "
                f"a {self.config.model_type} model needs it"
            )
        tensor = self.checkpoint.tensor(file_name)
        if tensor.shape != shape:
            raise ShapeError(
                f"{self.path}: {file_name}: expected shape {shape} by config.json, found "
                f"{tensor.shape}"
            )
        self.used.add(file_name)
        return tensor

    def fill(self, name: str, module: nnx.Module) -> None:
        """A norm or an embedding, as stored; an embedding only if the model's dtype holds it."""
        for child, value in _params(module):
            tensor = self.tensor(f"{name}.{child}", value.shape)
            dtype = tensor.dtype
            if isinstance(module, Embedding) and jnp.promote_types(dtype, self.dtype) != self.dtype:
                dtype = self.dtype
            values = host.empty(tensor.shape, dtype)
            values[...] = tensor
            setattr(module, child, nnx.Param(jax.device_put(values)))

    def fill_linear(self, name: str, layer: nnx.Linear) -> None:
        """A float layer; a bias that only the files know of is kept."""
        shape = (layer.in_features, layer.out_features)
        if _is_conv1d(self.config):
            kernel = jnp.array(self.tensor(f"{name}.weight", shape), self.dtype)
        else:
            kernel = jnp.array(self.tensor(f"{name}.weight", shape[::-1]), self.dtype).T
        layer.kernel = nnx.Param(kernel)
        if layer.use_bias or self.file_name(f"{name}.bias") in self.checkpoint:
            bias = self.tensor(f"{name}.bias", (layer.out_features,))
            layer.bias = nnx.Param(jnp.array(bias, self.dtype))
            layer.use_bias = True

    def layer_weight(self, name: str, layer: nnx.Linear) -> tuple[GptqWeight, np.ndarray | None]:
        """A quantized weight and its bias, to take the place of a float layer."""
        return self.weight(name, (layer.in_features, layer.out_features), layer.use_bias)

    def weight(
        self, name: str, expected: tuple[int, int], use_bias: bool
    ) -> tuple[GptqWeight, np.ndarray | None]:
        """A quantized weight of those features, and its bias. Raises ShapeError and
        MissingTensorError."""
        file_name = self.file_name(name)
        weight = self.checkpoint.weight(file_name)
        if weight.shape != expected:
            raise ShapeError(
                f"{self.path}: {file_name}: expected a weight {expected} by config.json, found "
                f"{weight.shape}"
            )
        if use_bias and f"{file_name}.bias" not in self.checkpoint:
            raise MissingTensorError(
                f"{self.path}: expected tensor '{file_name}.bias', found in no file of this "
                f"checkpoint; a {self.config.model_type} model needs it"
            )
        return weight, self.checkpoint.bias(file_name)

    def prepared(self, weight: GptqWeight, bias: ArrayLike | None) -> QuantizedLinear:
        """The layer, repacked for its backend."""
        linear = GptqLinear.from_weight(weight, bias, layout=self.layout)
        return QuantizedLinear.from_linear(linear)

    def folds(self, mlp: str) -> bool:
        """Whether all three projections of that MLP are quantized."""
        return all(self.is_quantized(f"{mlp}.{child}") for child in _MLP)

    def folded_mlp(self, name: str, mlp: Mlp) -> dict[str, QuantizedLinear]:
        """Its three layers by name, with the act-order of `down_proj` in the columns before it."""
        loaded = {
            child: self.layer_weight(f"{name}.{child}", getattr(mlp, child)) for child in _MLP
        }
        order = act_order.folding_order(loaded["down_proj"][0])
        layers = {}
        for child, (weight, bias) in loaded.items():
            if order is not None and child == "down_proj":
                weight = act_order.permute_rows(weight, order)
            elif order is not None:
                weight = act_order.permute_columns(weight, order)
                bias = None if bias is None else bias[order]
            layers[f"{name}.{child}"] = self.prepared(weight, bias)
        return layers

    def warn_of_unused(self) -> None:
        """A tensor that no layer took may mean that the model is not what config.json says."""
        unused = [
            name
            for name in self.checkpoint.names()
            if name not in self.used
            and name.rpartition(".")[0] not in self.quantized
            and not name.endswith(_IGNORED_ENDINGS)
            and not (self.config.tie_embeddings and name == "lm_head.weight")
        ]
        if unused:
            warnings.warn(
                f"{self.path}: {len(unused)} tensors have no place in a {self.config.model_type} "
                f"model and are ignored: {', '.join(unused[:5])}",
                stacklevel=3,
            )
