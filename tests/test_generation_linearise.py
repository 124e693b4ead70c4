"""E2E, WebNLG and DART read into sources and references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results.generation.linearise import (
    Example,
    read_dart,
    read_e2e,
    read_webnlg,
    spaced,
    training_pairs,
)
from peft_pst.cli.errors import UserError

Reader = Callable[[Path], list[Example]]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def webnlg_entry(category: str, triples: list[list[str]], *lex: tuple[str, str]) -> str:
    texts, comments = [text for text, _ in lex], [comment for _, comment in lex]
    return json.dumps({"category": category, "triples": triples, "lex": texts, "lex_comment": comments}) + "\n"


def test_e2e_groups_the_references_of_one_source_wherever_they_stand(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "e2e.csv",
        'mr,ref\n"name[Alimentum], area[city centre], familyFriendly[no]","In the centre, Alimentum isn\'t for kids."\n'
        '"name[Café Sicilia], eatType[coffee shop], priceRange[£20-25], customer rating[5 out of 5]",Good.  Dear!\n'
        '"name[Alimentum], area[city centre], familyFriendly[no]", Not family-friendly \n',
    )
    assert read_e2e(path) == [
        Example(
            "name : Alimentum | area : city centre | family friendly : no",
            ("In the centre , Alimentum isn 't for kids .", "Not family - friendly"),
            "all",
        ),
        Example(
            "name : Café Sicilia | Type : coffee shop | price : £ 20 - 25 | customer rating : 5 out of 5",
            ("Good . Dear !",),
            "all",
        ),
    ]


def test_webnlg_takes_good_references_and_tells_seen_categories_from_unseen(tmp_path: Path) -> None:
    airport = [["Aarhus_Airport", "cityServed", '"Aarhus, Denmark"'], ["Aarhus_Airport", "runwayLength", "2776.0"]]
    path = write(
        tmp_path,
        "webnlg.jsonl",
        webnlg_entry("Airport", airport, ("One.", "good"), ("Bad.", "toFix"), ("Two.", "good"))
        + webnlg_entry("Food", [["Ajoblanco", "country", "Spain"]], ("Bad.", "toFix"))
        + webnlg_entry("Artist", [["Ace_Wilder", "birthYear", "1982"]], ("Three.", "good")),
    )
    assert read_webnlg(path) == [
        Example(
            'Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus_Airport : runwayLength : 2776.0',
            ("One.", "Two."),
            "seen",
        ),
        Example("Ace_Wilder : birthYear : 1982", ("Three.",), "unseen"),
    ]


def test_dart_takes_all_annotations_and_writes_properties_in_lower_case(tmp_path: Path) -> None:
    entries = [
        {
            "tripleset": [["Mars Hill College", "JOINED", "1973"], ["Mars Hill College", "LOCATION", "North Carolina"]],
            "subtree_was_extended": False,
            "annotations": [{"source": "lily", "text": "It joined."}, {"source": "hit", "text": "Joined in 1973."}],
        },
        {"tripleset": [["A", "B", "C"]], "annotations": [{"source": "lily", "text": "ABC"}]},
        {"tripleset": [["A", "b", "C"]], "annotations": [{"source": "lily", "text": "abc"}]},
    ]
    assert read_dart(write(tmp_path, "dart.json", json.dumps(entries))) == [
        Example(
            "Mars Hill College : joined : 1973 | Mars Hill College : location : North Carolina",
            ("It joined.", "Joined in 1973."),
            "all",
        ),
        Example("A : b : C", ("ABC", "abc"), "all"),
    ]


def test_training_pairs_are_one_a_reference() -> None:
    examples = [Example("s", ("a", "b"), "all"), Example("t", ("c",), "seen")]
    assert training_pairs(examples) == [("s", "a"), ("s", "b"), ("t", "c")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's £10.50, isn't it?", "It 's £ 10.50 , isn 't it ?"),
        ("hors d'oeuvres ('fine')", "hors d 'oeuvres ( ' fine ' )"),
        ("Café  1,000 .", "Café 1,000 ."),
        ("  ", ""),
    ],
)
def test_spaced(text: str, expected: str) -> None:
    assert spaced(text) == expected


@pytest.mark.parametrize("reader", [read_e2e, read_webnlg, read_dart])
def test_missing_files_are_refused(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.csv: there is no such file"):
        reader(tmp_path / "nowhere.csv")


DART = '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "t"}]}, %s]'


@pytest.mark.parametrize(
    ("reader", "name", "text", "message"),
    [
        (read_e2e, "a.csv", "text,label\nx,y\n", r"a.csv has no column 'mr', only 'text', 'label'; expected a CSV"),
        (read_e2e, "a.csv", 'mr,ref\n"name[a]",x\nname,y\n', r"a.csv, row 2: mr is 'name'; expected 'attribute\[value"),
        (read_e2e, "a.csv", 'mr,ref\n"name[a], area",x\n', r"row 1: mr is 'name\[a\], area'"),
        (read_e2e, "a.csv", 'mr,ref\n"name[a]"," "\n', r"a.csv, row 1: a reference is '.*'; expected a text"),
        (read_e2e, "a.csv", 'mr,ref\n"name[a]",x,y\n', r"a.csv, row 1: 3 fields, .* Expected a CSV with the columns"),
        (read_webnlg, "a.jsonl", '{"lex": []}\n', r"a.jsonl has no column 'category', only 'lex'; expected lines like"),
        (read_webnlg, "a.jsonl", "x\n", r"a.jsonl, row 1 is not JSON .* Expected lines like"),
        (read_webnlg, "a.jsonl", webnlg_entry("Food", [["a", "b"]], ("x", "good")), r"row 1: the triples are \[\['a'"),
        (read_webnlg, "a.jsonl", webnlg_entry("Food", [], ("x", "good")), r"row 1: the triples are \[\]; expected"),
        (read_webnlg, "a.jsonl", webnlg_entry("Food", [["a", "b", "c"]], ("x", "bad")), r"holds no references to use"),
        (
            read_webnlg,
            "a.jsonl",
            '{"category": "Food", "triples": [["a", "b", "c"]], "lex": ["x", "y"], "lex_comment": ["good"]}\n',
            r"row 1: 'lex' and 'lex_comment' must be lists of one length",
        ),
        (read_dart, "a.json", "[", r"a.json is not JSON in UTF-8 .*line 1.*DART's form is"),
        (read_dart, "a.json", "{}", r"a.json holds dict, not a list; DART's form is"),
        (read_dart, "a.json", "[]", r"a.json holds no references to use"),
        (read_dart, "a.json", DART % "{}", r"a.json, entry 2 has no list 'annotations'"),
        (read_dart, "a.json", DART % '{"annotations": [{"text": "t"}]}', r"entry 2: the triples are None"),
        (
            read_dart,
            "a.json",
            DART % '{"tripleset": [["a", 1, "c"]], "annotations": [{"text": "t"}]}',
            r"entry 2: the triples are \[\['a', 1",
        ),
        (
            read_dart,
            "a.json",
            DART % '{"tripleset": [["a", "b", "c"]], "annotations": ["t"]}',
            r"entry 2: a reference is None; expected a text",
        ),
    ],
)
def test_wrong_files_are_named_with_row_and_form(
    reader: Reader, name: str, text: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        reader(write(tmp_path, name, text))
