"""Every operation of PEFT's, on models of every kind and configurations of every kind, as `contract.py` lists them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from compatibility_page import PAGE, README, page, readme
from contract import OPERATIONS, Operation
from contract_cases import CASES, Case

PAIRS = [
    pytest.param(
        operation,
        case,
        id=f"{operation.run.__name__}-{case.name}",
        marks=[pytest.mark.slow] if case.slow else [],
    )
    for operation in OPERATIONS
    for case in CASES
    if operation.applies(case)
]


@pytest.mark.parametrize(("operation", "case"), PAIRS)
def test_contract(operation: Operation, case: Case, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # Schedules that do not move are part of some operations, and PEFT warns about second adapters.
        warnings.simplefilter("ignore")
        if operation.refusal is None:
            operation.run(case, tmp_path)
        else:
            error, message = operation.refusal
            with pytest.raises(error, match=message):
                operation.run(case, tmp_path)


def test_every_operation_is_tried() -> None:
    tried = {pair.values[0].name for pair in PAIRS}
    assert {operation.name for operation in OPERATIONS} == tried
    assert len({operation.name for operation in OPERATIONS}) == len(OPERATIONS)


def test_the_page_says_what_is_tried() -> None:
    assert PAGE.read_text() == page(), "run `make compatibility`"
    assert README.read_text() == readme(), "run `make compatibility`"
