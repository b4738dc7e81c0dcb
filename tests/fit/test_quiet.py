"""What reaches the screen during a run."""

from __future__ import annotations

import warnings

from kw_lightning.fit import quiet as module
from kw_lightning.fit.quiet import quiet


def test_a_warning_of_the_package_is_its_sentence_and_others_keep_their_place() -> None:
    before = warnings.formatwarning
    with quiet():
        assert warnings.formatwarning("it ends early", UserWarning, module.__file__, 7) == "it ends early\n"
        assert "/elsewhere/loader.py:7: " in warnings.formatwarning("odd", UserWarning, "/elsewhere/loader.py", 7)
    assert warnings.formatwarning is before
