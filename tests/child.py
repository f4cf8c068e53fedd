"""Python in a process of its own: for what JAX decides when it starts."""

import os
import subprocess
import sys
import textwrap


def run_script(script: str, *, devices: int | None = None, timeout: int = 300) -> str:
    """What `script` prints, run on the CPU with this folder to import from; fails if it does.

    `devices`: as many as that XLA makes of the host.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if devices is not None:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    path = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    child = subprocess.run(
        [sys.executable, "-P", "-c", path + textwrap.dedent(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout
