"""Settings for all tests."""

from hypothesis import settings

# A busy machine is no failure: timings never decide a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
