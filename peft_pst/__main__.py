"""`python -m peft_pst`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
