"""Reading local files: CSV, TSV and JSONL as columns, with errors that name file and row."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .errors import UserError


class Table(NamedTuple):
    """Rows of named fields.

    Attributes:
        source: the file, or the data set and split, for messages.
        columns: {name: one value a row}; strings from CSV and TSV, JSON values from JSONL, all of one length.
        incomplete: number of rows that were left out because fields are missing.
    """

    source: str
    columns: dict[str, list[Any]]
    incomplete: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, option: str) -> list[Any]:
        """The values of a column, or an error that lists the columns there are."""
        if name not in self.columns:
            raise UserError(
                f"{self.source} has no column {name!r}; it has {', '.join(map(repr, self.columns))}. Pass --{option}."
            )
        return self.columns[name]

    def texts(self, name: str, option: str) -> list[str]:
        """The values of a column of texts, or an error that names the first row without one."""
        values = self.column(name, option)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(f"{self.where(row)}: {name!r} is {value!r}, not a text.")
        return values

    def where(self, row: int) -> str:
        """How messages call a row, given its index from 0."""
        return f"{self.source}, row {row + 1}"


def check_file(path: str, option: str) -> None:
    """Refuse a file that does not exist."""
    if not Path(path).is_file():
        raise UserError(f"--{option} {path}: there is no such file.")


def read_table(
    path: str, *, headerless: Sequence[str] = (), header_has: str = "", skip_incomplete: bool = False
) -> Table:
    """Read a CSV, TSV or JSONL file.

    A .tsv file is read without quoting, as GLUE's are; so is a file of another name whose first line has a tab and no
    comma before it. Other files are CSV with the usual quoting. Files are UTF-8.

    Args:
        path: the file; .jsonl and .json hold one JSON object a line.
        headerless: column names to use when the first line is not a header.
        header_has: with `headerless`, the column that makes the first line a header.
        skip_incomplete: leave out rows of the wrong number of fields and count them, instead of refusing the file.

    Raises:
        UserError: if the file is empty or not UTF-8, or a row does not fit; the message names file and row.
    """
    suffix = Path(path).suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix in (".jsonl", ".json"):
                table = _read_jsonl(path, file)
            else:
                rows = _split_rows(file, suffix)
                table = _read_rows(path, rows, headerless, header_has, skip_incomplete)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}; convert it first, for example with iconv.") from error
    except csv.Error as error:
        raise UserError(f"{path} could not be read: {error}") from error
    if not len(table):
        raise UserError(f"{path} holds no rows.")
    return table


def _split_rows(file: TextIO, suffix: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    first_line = file.readline()
    file.seek(0)
    first_field, tab, _ = first_line.partition("\t")
    if suffix == ".tsv" or (tab and "," not in first_field):
        return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file, strict=True)


def _read_rows(
    path: str, rows: Iterator[list[str]], headerless: Sequence[str], header_has: str, skip_incomplete: bool
) -> Table:
    first = next(rows, [])
    if headerless and header_has not in first:
        header, kept = list(headerless), [first]
        if len(first) < len(header):
            raise UserError(f"{path} has {len(first)} columns; without a header line it needs {', '.join(header)}.")
    else:
        header, kept = first, []
    _check_header(path, header)
    incomplete = 0
    for number, row in enumerate(rows, start=len(kept) + 1):
        if not row:
            continue  # a blank line
        if len(row) == len(header) or (headerless and len(row) > len(header)):
            kept.append(row)
        elif skip_incomplete:
            incomplete += 1
        else:
            raise UserError(f"{path}, row {number}: {len(row)} fields, but there are {len(header)} columns.")
    return Table(path, {name: [row[i] for row in kept] for i, name in enumerate(header)}, incomplete)


def _check_header(path: str, header: Sequence[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"{path} has more than one column {repeated[0]!r}; rename all but one.")


def _read_jsonl(path: str, file: TextIO) -> Table:
    rows = []
    for number, line in enumerate(filter(str.strip, file), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, row {number} is not JSON ({error}); write one object a line.") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, row {number} is not a JSON object such as {{"text": "...", "label": "..."}}.')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names})
