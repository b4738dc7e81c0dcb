"""What a recipe may be at most, so that a stranger's file is refused in a moment and not after it took the machine.

Every limit is far above what the largest shipped recipe needs, and is checked while reading, before anything of that
size is made.
"""

from __future__ import annotations

MAX_BYTES = 1 << 20
"""Bytes of one recipe, everything it extends included."""
MAX_DEPTH = 64
"""Maps and lists inside each other, aliases expanded."""
MAX_VALUES = 10_000
"""Maps, lists, keys and scalars of one recipe, aliases and `vars` expanded, everything it extends included."""
MAX_TEXT = 1 << 16
"""Characters of one text, and of all texts together that `vars` write."""
MAX_KEY = 200
"""Characters of one key."""
MAX_DIGITS = 18
"""Digits of one number."""
MAX_EXTENDS_DEPTH = 8
"""Recipes that extend each other in a row."""
MAX_FILES = 32
"""Files that one recipe is made of."""
MAX_PROBLEMS = 100
"""Mistakes shown of one recipe; a last line says that there are more."""
MAX_IMAGE = 1 << 28
"""Numbers in one made-up image."""
