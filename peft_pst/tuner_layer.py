"""What every layer that PST puts into a model has in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer


class PSTTunerLayer(BaseTunerLayer):
    """A layer with PST adapters, whether it prunes or not; PEFT switches, deletes and freezes all of them alike."""

    module_name: str  # of the base layer, in the plain model
    # PEFT's `disable_input_dtype_casting` sets this. Inputs are never cast here, as the base layer does not.
    cast_input_dtype_enabled = True

    @contextmanager
    def refusing_damage(self, adapter_name: str) -> Iterator[None]:
        """Say in which layer, and what to do, when stored tensors are refused by the block."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"Layer {self.module_name}, adapter {adapter_name!r}: {error} The adapter file is damaged or belongs "
                "to another model; load the one that was saved for this base."
            ) from error
