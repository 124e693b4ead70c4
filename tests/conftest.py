"""Settings for all tests."""

import gc
import os

# Tiny models gain nothing from a second thread, and lose much when something else runs on its core. Set before torch is
# imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from tiny_checkpoints import save_bert, save_gpt2

# A busy machine is no failure: timings never decide a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Spare what is imported by now from garbage collection, which the Trainer asks for in full after every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their pictures, which take half the time of training a tiny model."""
    for name in ("plot_layer_sparsity", "plot_kept_weights", "plot_training"):
        monkeypatch.setattr(f"peft_pst.cli.report.{name}", lambda _, path, **__: path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny BERT with its tokenizer."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny GPT-2 with its tokenizer."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))
