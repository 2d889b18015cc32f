"""What holds for every test: how properties are drawn, and how many threads torch takes."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before torch is imported. The models of tests are not worth a second thread, and on a busy machine two that wait for
# each other are far slower than one. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No property judges the machine: an example may take as long as it takes, also to draw. Always the same examples, so
# that what was green is green again; `make test-slow` draws new ones, as does --hypothesis-profile=anew.
settings.register_profile(
    "fixed", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True
)
settings.register_profile("anew", settings.get_profile("fixed"), derandomize=False)
settings.load_profile("fixed")
