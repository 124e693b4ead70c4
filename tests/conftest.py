"""Settings for all tests."""

import os

# Tiny models gain nothing from a second thread, and lose much when something else runs on its core. Set before torch is
# imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# A busy machine is no failure: timings never decide a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
