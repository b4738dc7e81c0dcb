"""Versions of what a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("kw-lightning", "torch", "torchvision", "lightning", "torchmetrics", "numpy", "timm")


def package_versions() -> dict[str, str]:
    """Return the version of Python and of each package that is installed, by name; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
