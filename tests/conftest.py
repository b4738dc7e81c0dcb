"""Random cases are the same in every ordinary run: a change is not held up by what it did not cause.

The slow studies draw other cases each time; see `fuzzing.fuzz`. Run side by side, the tests share the machine's cores:
torch's threads, more of them than cores, would wait for each other most of the time.
"""

import os

from hypothesis import settings

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch is imported, and for processes of tests too
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

settings.register_profile("ordinary", derandomize=True, deadline=None)
settings.load_profile("ordinary")
