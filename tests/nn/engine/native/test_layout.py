"""The structures of Python and of C are compared field by field."""

from __future__ import annotations

import ctypes

import pytest

from kw_lightning.nn.engine import native
from kw_lightning.nn.engine.native import layout, library


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_a_structure_that_lacks_or_moves_a_field_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library.library()
    assert layout.difference(loaded) is None
    fields = list(layout.Map._fields_)
    for changed, told in (
        (fields[:-1], "Map is 40 bytes at 0 in the library, and 32 bytes at 0"),
        ([fields[1], fields[0], *fields[2:]], "Map.batch is 8 bytes at 8 in the library, and 8 bytes at 0"),
        ([*fields, ("added", ctypes.c_int64)], "Map.added is missing in the library, and 8 bytes at 40"),
    ):
        monkeypatch.setattr(layout, "Map", type("Map", (ctypes.Structure,), {"_fields_": changed}))
        assert layout.difference(loaded) == f"{told} in layout.py"
