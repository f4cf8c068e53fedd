"""The suite runs on a GPU as it does on the host."""

import contextlib

import jax
import pytest

# Products that the tests compare with are in full f32 on GPUs too, where TF32 is the default.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def device(request):
    """Tests marked `host` run on the CPU, whatever the default device is."""
    host = request.node.get_closest_marker("host") is not None
    with jax.default_device(jax.devices("cpu")[0]) if host else contextlib.nullcontext():
        yield
