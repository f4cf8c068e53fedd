"""Registers the package's frozen dataclasses as pytrees, with `jax.export` serialization."""

import dataclasses
import json
from typing import Any, TypeVar

import jax
import jax.export

T = TypeVar("T")


def static_field(**kwargs: Any) -> Any:
    """A dataclass field that is part of the pytree's structure: a hashable, JSON-able value."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def register_pytree(cls: type[T]) -> type[T]:
    """Class decorator for a frozen dataclass whose fields are arrays or `static_field()`s.

    `jax.tree_util` sees the arrays as leaves; `jax.export.Exported.serialize` writes the static
    fields as JSON under the class's name, which is therefore a contract.
    """
    jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_gptq.{cls.__name__}",
        serialize_auxdata=lambda aux: json.dumps(aux).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )
    return cls
