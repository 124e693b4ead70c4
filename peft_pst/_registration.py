"""Makes PST a method of PEFT. The only file that touches PEFT's mappings, or asks for anything when imported.

`peft.utils.register_peft_method` refuses names that are not in PEFT's own enum of methods, but everything else looks a
method up by equality and hash in three mappings, for which an enum of ours serves as well.
"""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from .config import PSTConfig, PSTPeftType
from .model import PSTModel
from .model_card import keep_section_in_cards
from .nesting import refuse_tuners_over_pst
from .taking_back import take_back_failed_loads

OLDEST_PEFT = "0.21.0"  # before, state dicts were matched against PEFT's closed enum


def register() -> None:
    """Enter PST in PEFT's mappings; entering it again is harmless.

    Raises:
        ImportError: if PEFT is too old, or knows another method under the name PST or the prefix pst_.
    """
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(
            f"peft_pst needs peft>={OLDEST_PEFT}, but peft {peft.__version__} is installed; run "
            f"`pip install --upgrade 'peft>={OLDEST_PEFT}'`."
        )
    key: Any = PSTPeftType.PST  # the mappings are annotated with PEFT's closed enum, and look up by equality
    prefix = PSTModel.prefix
    existing = PEFT_TYPE_TO_TUNER_MAPPING.get(key)
    # By name and not by identity, so that reloading the module replaces its own entry.
    is_ours = existing is None or existing.__module__ == PSTModel.__module__
    prefix_owners = [other for other, taken in PEFT_TYPE_TO_PREFIX_MAPPING.items() if taken == prefix and other != key]
    if key.value in {member.value for member in PeftType} or not is_ours or prefix_owners:
        raise ImportError(
            f"peft {peft.__version__} already has a method named {key.value} or with the prefix {prefix}, which "
            "peft_pst would shadow. Upgrade peft_pst, or install an older peft."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = PSTConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = PSTModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = prefix
    refuse_tuners_over_pst()
    keep_section_in_cards()
    take_back_failed_loads()
