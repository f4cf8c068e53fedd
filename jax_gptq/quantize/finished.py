"""Finished layers of an interrupted run, kept in a folder until the whole model is done."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from jax_gptq.errors import QuantizationError
from jax_gptq.quantize.report import Report
from jax_gptq.weight import GptqWeight

_STATE = "state.json"
_STATIC = ("bits", "group_size", "in_features", "out_features")


class FinishedLayers:
    """One file per finished layer, written under another name and renamed: it is whole or absent.

    The folder remembers which run it belongs to.
    """

    def __init__(self, folder: str | Path, run: str):
        """`run` identifies model, data and options (`fingerprint`). Raises QuantizationError."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / _STATE
        if not state.exists():
            _write(state, json.dumps({"run": run}).encode())
        elif json.loads(state.read_bytes()).get("run") != run:
            raise QuantizationError(
                f"{self.folder}: expected the finished layers of this run, found those of another "
                f"model, calibration data or options; delete the folder to start over"
            )

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def load(self, name: str) -> tuple[GptqWeight, Report] | None:
        """What was saved for a layer, None where it is not finished."""
        if name not in self:
            return None
        tensors: dict[str, Any] = load_file(self._path(name))
        facts = json.loads(bytes(tensors.pop("facts")))
        report = Report(**{**facts["report"], "notes": tuple(facts["report"]["notes"])})
        arrays = {key: jnp.asarray(value) for key, value in tensors.items()}
        weight = GptqWeight(**{"g_idx": None, **arrays, **facts["static"]})
        return weight, report

    def save(self, name: str, weight: GptqWeight, report: Report) -> None:
        """Keep a layer; once this returns, a killed run resumes behind it."""
        facts = {
            "static": {key: getattr(weight, key) for key in _STATIC},
            "report": report.__dict__,
        }
        tensors = {
            "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
            "qweight": np.asarray(weight.qweight),
            "scales": np.asarray(weight.scales),
            "qzeros": np.asarray(weight.qzeros),
        }
        if weight.g_idx is not None:
            tensors["g_idx"] = np.asarray(weight.g_idx)
        _write(self._path(name), save(tensors))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def fingerprint(facts: object, arrays) -> str:
    """A hash of JSON-able facts and of arrays."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
