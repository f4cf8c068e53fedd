"""The small model that ships inside the package."""

from pathlib import Path


def embedded_path() -> Path:
    """Its checkpoint folder."""
    return Path(__file__).parent / "embedded_model"
