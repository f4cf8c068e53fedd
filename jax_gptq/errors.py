"""Every exception a user of jax_gptq can see: one class per cause.

All are subclasses of `JaxGptqError`, and also of the built-in exception that Python itself would
raise in that place. A message names the file and tensor where there is one, what was expected,
what was found and what to do.
"""


class JaxGptqError(Exception):
    """Base of every error raised by jax_gptq."""


class ShapeError(JaxGptqError, ValueError):
    """An array has a shape that contradicts the other arrays, `bits` or the layer's features."""


class DtypeError(JaxGptqError, TypeError):
    """An array has a dtype that the operation does not take."""


class BitsError(JaxGptqError, ValueError):
    """A bit width that is unknown, or that the requested format cannot express."""


class GroupIndexError(JaxGptqError, ValueError):
    """`g_idx` is missing where it is needed, out of range, or not an integer."""


class ScalesError(JaxGptqError, ValueError):
    """`scales` holds a NaN or an infinity."""


class ZeroPointError(JaxGptqError, ValueError):
    """`qzeros` contradicts the checkpoint format or cannot be written in it."""


class CheckpointFormatError(JaxGptqError, ValueError):
    """An unknown or contradictory `quant_method`, `checkpoint_format` or `pack_dtype`."""


class ConfigError(JaxGptqError, ValueError):
    """A configuration file is missing, is not JSON, or holds a value that cannot be used."""


class MissingTensorError(JaxGptqError, KeyError):
    """A tensor that the checkpoint should hold is not in any of its files."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class MissingFileError(JaxGptqError, FileNotFoundError):
    """A checkpoint folder, or a shard that its index names, does not exist."""


class CorruptFileError(JaxGptqError, ValueError):
    """A file is a Git LFS pointer, truncated, or not a safetensors file."""


class LayoutError(JaxGptqError, ValueError):
    """An unknown layout, or one that cannot hold this weight."""


class BackendError(JaxGptqError, ValueError):
    """An unknown backend, or one that cannot run this store or these activations."""


class ShardingError(JaxGptqError, ValueError):
    """A mesh, or an axis of one, over which a weight cannot be cut."""


class TracingError(JaxGptqError, TypeError):
    """Something that must happen once, outside `jax.jit`, was called while tracing."""


class MissingExtraError(JaxGptqError, ImportError):
    """A submodule needs an optional dependency that is not installed."""


class ModelError(JaxGptqError, ValueError):
    """A model's configuration or the input given to a model cannot be used."""


class QuantizationError(JaxGptqError, ValueError):
    """A layer cannot be quantized: bad Hessian, calibration data or options."""
