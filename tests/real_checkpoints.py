"""Checkpoints that other projects wrote, with their answers: `shared/checkpoints`, where it is.

Looked for inside the repository and beside it. Each folder holds a `ref.npz`.
"""

from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(
    path.parent
    for root in (_ROOT, _ROOT.parent)
    for path in root.glob("shared/checkpoints/*/ref.npz")
)
needs_checkpoints = pytest.mark.skipif(
    not FOLDERS, reason="shared/checkpoints is neither in the repository nor beside it"
)


def each_checkpoint(test):
    """Run `test(folder)` for every folder there is."""
    return needs_checkpoints(
        pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)(test)
    )


def logits_tolerance(folder: Path) -> float:
    """Relative Frobenius error; this one folder's answers were rounded through float16."""
    return 2e-3 if folder.name == "llama_dyn_mixed_v1" else 1e-4
