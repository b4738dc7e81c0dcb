"""A network and a data set that train in a second."""

import pytest
from quick_run import QUICK


@pytest.fixture
def quick() -> list[str]:
    """Return `QUICK`, to be added to."""
    return [*QUICK]
