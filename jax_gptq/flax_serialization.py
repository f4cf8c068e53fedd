"""Registers the public pytrees with `flax.serialization`, for `to_bytes` and `from_bytes`."""

import dataclasses
from typing import Any

from flax import serialization

from jax_gptq.linear import GptqLinear
from jax_gptq.stores import PACKED_LAYOUTS
from jax_gptq.stores.dense import DenseStore
from jax_gptq.weight import GptqWeight


def _array_fields(tree: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(tree) if not f.metadata.get("static")]


def _to_state(tree: Any) -> dict[str, Any]:
    return {n: serialization.to_state_dict(getattr(tree, n)) for n in _array_fields(tree)}


def _from_state(tree: Any, state: dict[str, Any]) -> Any:
    restored = {
        n: serialization.from_state_dict(getattr(tree, n), state[n], name=n)
        for n in _array_fields(tree)
    }
    return dataclasses.replace(tree, **restored)


for _cls in (GptqWeight, GptqLinear, DenseStore, *PACKED_LAYOUTS.values()):
    serialization.register_serialization_state(_cls, _to_state, _from_state)
