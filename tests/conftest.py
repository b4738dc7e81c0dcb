"""Random cases are the same in every ordinary run: a change is not held up by what it did not cause.

The slow studies draw other cases each time; see `fuzzing.fuzz`.
"""

from hypothesis import settings

settings.register_profile("ordinary", derandomize=True, deadline=None)
settings.load_profile("ordinary")
