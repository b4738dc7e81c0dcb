"""Whether Keras is installed: where it is not, this folder alone would pass for a package of that name."""

from __future__ import annotations

import importlib.util


def has_keras() -> bool:
    """Return whether `import keras` gives Keras."""
    found = importlib.util.find_spec("keras")
    return found is not None and found.origin is not None
