"""E2E, WebNLG and DART as plain text: one line of attributes or triples, and the references that say them.

The text is that of the public linearised sets that LoRA and, after it, PST (Li et al. 2022, arXiv 2205.11005) trained
on: `name : Alimentum | area : city centre`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft_pst.cli.errors import UserError
from peft_pst.cli.files import Table, read_table

SEEN_CATEGORIES = frozenset(
    {
        "Airport",
        "Astronaut",
        "Building",
        "City",
        "ComicsCharacter",
        "Food",
        "Monument",
        "SportsTeam",
        "University",
        "WrittenWork",
    }
)
# What the linearised set calls the attributes of the CSV that are not plain words.
_E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_ATTRIBUTE = re.compile(r"\s*(?P<name>[^\[\],]+)\[(?P<value>[^\]]*)\]\s*(?:,|$)")
# A number with its decimals, the end of a contraction, a word, or one mark.
_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|(?<=\w)'\w+|\w+|[^\w\s]")
_WEBNLG_FORM = '{"category": "...", "triples": [["subject", "property", "object"]], "lex": [...], "lex_comment": [...]}'
_DART_FORM = '[{"tripleset": [["subject", "property", "object"]], "annotations": [{"text": "..."}]}]'


class Example(NamedTuple):
    """One source and all that people wrote about it.

    Attributes:
        source: the data as text, without the separator.
        references: the texts, at least one, none empty, in the file's order.
        group: the part of a test set that is also reported apart: "seen" or "unseen" for WebNLG, else "all".
    """

    source: str
    references: tuple[str, ...]
    group: str


def read_e2e(path: str | Path) -> list[Example]:
    """Read the E2E challenge's CSV: columns `mr` and `ref`, one reference a row.

    Values and references are tokenised by spaces round punctuation (`spaced`), so that a value can be copied.

    Returns:
        One example a meaning representation, in the order in which they first appear, with all its references.

    Raises:
        UserError: if the file is missing or of another form; the message names file and row.
    """
    table = _table(path, ("mr", "ref"), "a CSV with the columns mr and ref")
    rows = zip(table.columns["mr"], table.columns["ref"], strict=True)
    return _gather(
        path,
        (
            (_attributes(mr, table.where(i)), [spaced(_text(ref, table.where(i)))], "all")
            for i, (mr, ref) in enumerate(rows)
        ),
    )


def read_webnlg(path: str | Path) -> list[Example]:
    """Read WebNLG 2017 as JSON lines: category, triples, lex, lex_comment.

    Only references marked "good" are taken; an entry without one is left out. Triples are written as they stand.

    Returns:
        One example a set of triples; its group is "seen" for the ten categories of the training set, else "unseen".

    Raises:
        UserError: if the file is missing or of another form; the message names file and row.
    """
    table = _table(path, ("category", "triples", "lex", "lex_comment"), f"lines like {_WEBNLG_FORM}")

    def entries() -> Iterator[tuple[str, list[str], str]]:
        columns = (table.columns[name] for name in ("category", "triples", "lex", "lex_comment"))
        for i, (category, triples, texts, comments) in enumerate(zip(*columns, strict=True)):
            where = table.where(i)
            if not (isinstance(texts, list) and isinstance(comments, list) and len(texts) == len(comments)):
                raise UserError(
                    f"{where}: 'lex' and 'lex_comment' must be lists of one length; got {texts!r}, {comments!r}."
                )
            good = [_text(text, where) for text, comment in zip(texts, comments, strict=True) if comment == "good"]
            group = "seen" if category in SEEN_CATEGORIES else "unseen"
            yield _joined(_triples(triples, where)), good, group

    return _gather(path, entries())


def read_dart(path: str | Path) -> list[Example]:
    """Read DART's JSON: a list of {"tripleset": [[s, p, o], ...], "annotations": [{"source", "text"}, ...]}.

    All annotations are references; properties are written in lower case.

    Returns:
        One example a set of triples, of the group "all".

    Raises:
        UserError: if the file is missing or of another form; the message names file and entry.
    """
    data = _read_json(path)
    if not isinstance(data, list):
        raise UserError(f"{path} holds {type(data).__name__}, not a list; DART's form is {_DART_FORM}.")

    def entries() -> Iterator[tuple[str, list[str], str]]:
        for number, entry in enumerate(data, start=1):
            where = f"{path}, entry {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("annotations"), list):
                raise UserError(f"{where} has no list 'annotations'; DART's form is {_DART_FORM}.")
            texts = [item.get("text") if isinstance(item, dict) else None for item in entry["annotations"]]
            triples = [(s, p.lower(), o) for s, p, o in _triples(entry.get("tripleset"), where)]
            yield _joined(triples), [_text(text, where) for text in texts], "all"

    return _gather(path, entries())


def spaced(text: str) -> str:
    """Put single spaces between words and punctuation; numbers and the ends of contractions stay whole.

    Example:
        >>> spaced("It's family-friendly, at £10.50.")
        "It 's family - friendly , at £ 10.50 ."
    """
    return " ".join(_TOKEN.findall(text))


def training_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Pairs of source and reference, one a reference.

    Example:
        >>> training_pairs([Example("name : Cotto", ("A pub .", "Cotto ."), "all")])
        [('name : Cotto', 'A pub .'), ('name : Cotto', 'Cotto .')]
    """
    return [(example.source, reference) for example in examples for reference in example.references]


def _attributes(mr: Any, where: str) -> str:
    """`name[Alimentum], area[city centre]` as `name : Alimentum | area : city centre`."""
    parts, position = [], 0
    while isinstance(mr, str) and (match := _ATTRIBUTE.match(mr, position)):
        name = match["name"].strip()
        parts.append(f"{_E2E_NAMES.get(name, name)} : {spaced(match['value'])}")
        position = match.end()
    if not parts or position < len(mr):
        raise UserError(f"{where}: mr is {mr!r}; expected 'attribute[value], attribute[value]'.")
    return " | ".join(parts)


def _triples(value: Any, where: str) -> list[tuple[str, str, str]]:
    triples = value if isinstance(value, list) else []
    if not triples or any(
        not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(part, str) for part in triple)
        for triple in triples
    ):
        raise UserError(f"{where}: the triples are {value!r}; expected [[subject, property, object], ...], all texts.")
    return [(s, p, o) for s, p, o in triples]


def _joined(triples: Iterable[tuple[str, str, str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: a reference is {value!r}; expected a text that is not empty.")
    return value.strip()


def _gather(path: str | Path, rows: Iterable[tuple[str, list[str], str]]) -> list[Example]:
    """All references of one source together, whichever rows they come from."""
    together: dict[tuple[str, str], list[str]] = {}
    for source, references, group in rows:
        if references:
            together.setdefault((source, group), []).extend(references)
    if not together:
        raise UserError(f"{path} holds no references to use.")
    return [Example(source, tuple(references), group) for (source, group), references in together.items()]


def _table(path: str | Path, names: tuple[str, ...], form: str) -> Table:
    _check_file(path)
    try:
        table = read_table(str(path))
    except UserError as error:
        raise UserError(f"{error} Expected {form}.") from error
    missing = [name for name in names if name not in table.columns]
    if missing:
        has = ", ".join(map(repr, table.columns))
        raise UserError(f"{path} has no column {missing[0]!r}, only {has}; expected {form}.")
    return table


def _read_json(path: str | Path) -> Any:
    _check_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not JSON; the latter's message holds the line
        raise UserError(f"{path} is not JSON in UTF-8 ({error}); DART's form is {_DART_FORM}.") from error


def _check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file.")
