"""Versions of what a result was made with."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata
from pathlib import Path

OWN = "kw-lightning"
PACKAGES = (OWN, "torch", "torchvision", "lightning", "torchmetrics", "numpy", "timm")


def package_versions() -> dict[str, str]:
    """Return the version of Python and of each package that is installed, by name; nothing is imported for it."""
    found = {package: version for package in PACKAGES if (version := version_of(package)) is not None}
    return {"python": platform.python_version(), **found}


def version_of(package: str) -> str | None:
    """Return the version of an installed package; of this one, where it is not installed, its source tree's."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _of_source_tree() if package == OWN else None


def _of_source_tree() -> str:
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"]) if project["name"] == OWN else "unknown"
    except (OSError, ValueError, KeyError):  # copied elsewhere
        return "unknown"
