"""`python -m peft_pst`."""

import sys

from .cli import main

sys.exit(main())
