"""Writes docs/compatibility.md, and its part of the README, from the list that the tests run: `make compatibility`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from contract import OPERATIONS, Operation
from peft_suite import EXCLUDED, INSERTED

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
README = ROOT / "README.md"
START, END = "<!-- compatibility: written by `make compatibility` -->", "<!-- end -->"
PACKAGES = ("torch", "peft", "transformers", "accelerate", "sentence-transformers", "trl", "diffusers")

NOTE = """
With transformers 5.14 and older, whose Trainer has a `warmup_ratio` of its own, the command line calls PST's
`--pst_warmup_ratio`. With 5.17 and older, a Trainer of several processes on CPUs cannot resume from a checkpoint. The
torch of both columns is the one that the tests run with.
"""

INTRODUCTION = """# Compatibility

What PEFT and its neighbours offer, and what it means for an adapter that changes the base weight by a mask. Written by
`make compatibility` from `tests/contract.py`, the list that the tests run on models of every kind and configurations of
every kind: whatever is said here was tried, and where it says *refused* an error says so too.

## Versions

The oldest and the newest versions that the tests pass with (`make test-oldest`, `make test`, `make test-integrations`):
"""


SUITE = """
## PEFT's own test-suite

`make test-peft` runs it with PST among the methods that it tries, on small models of the same architectures:
{files}. All its tests pass but these:

| test | with | why |
|---|---|---|
"""


def pinned(constraints: str) -> dict[str, str]:
    """The versions that a constraints file asks for, by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / constraints).read_text(), re.MULTILINE))


def versions(packages: Sequence[str] = PACKAGES) -> list[str]:
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    rows = [f"| {name} | {oldest.get(name, '-')} | {newest[name]} |" for name in packages]
    return ["| package | oldest | newest |", "|---|---|---|", *rows]


def line(operation: Operation) -> str:
    return f"| {operation.name} | {'*refused*: ' if operation.refusal else ''}{operation.meaning} |"


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *versions(), NOTE.rstrip()]
    for section, operations in groupby(OPERATIONS, key=lambda operation: operation.section):
        parts += ["", f"## {section}", "", "| operation | with PST |", "|---|---|", *map(line, operations)]
    return "\n".join([*parts, *suite()]) + "\n"


def readme() -> str:
    """The whole README, with what is refused and the versions between two comments."""
    before, _, rest = README.read_text().partition(START)
    _, _, after = rest.partition(END)
    refused = [f"| {each.name} | {each.meaning} |" for each in OPERATIONS if each.refusal]
    table = ["| refused | why |", "|---|---|", *refused]
    return before + "\n".join([START, "", *table, "", *versions(("peft", "transformers")), "", END]) + after


def suite() -> list[str]:
    """What is said of PEFT's own tests."""
    files = ", ".join(f"`{name.removesuffix('.py')}`" for name in sorted(INSERTED))
    failing = [
        f"| {', '.join(f'`{test}`' for test in excluded.tests)} | {', '.join(excluded.rows)} | {excluded.reason} |"
        for excluded in EXCLUDED
    ]
    return [SUITE.format(files=files).rstrip(), *failing]


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    README.write_text(readme())
