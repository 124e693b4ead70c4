"""Scores of generated texts: small cases by hand, and what holds of any."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("nltk", "rouge_score", "sacrebleu"):
    pytest.importorskip(package)

from benchmarks.results.generation.cider import cider_d  # noqa: E402
from benchmarks.results.generation.text_metrics import (  # noqa: E402
    LOWER_IS_BETTER,
    meteor,
    nist,
    rouge_l,
    score,
    tokenise,
)

TEXTS = [
    "The Vaults is a cheap pub near Café Adriatic.",
    "Blue Spice, a coffee shop, lies in the city centre!",
    "No family should visit Cotto by the riverside today.",
]
HYPOTHESES = ["the red cat sat on the mat", "two dogs ran", "a cat and a dog slept on the mat all day"]
REFERENCES = [
    ["a red cat sat on a mat", "the cat is on the red mat today"],
    ["two old dogs ran to the park"],
    ["the cat and the dog slept all day", "a dog slept on the mat", "they slept"],
]
COCO = 2.6885185871646793  # what CiderScorer of pycocoevalcap 1.2 gives for these
WORDS = st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "Dog", "ran,", "café", "£5"])
SENTENCES = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
CORPORA = st.lists(st.tuples(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3)), min_size=1, max_size=4)


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@pytest.mark.parametrize(
    ("hypothesis", "references", "expected"),
    [
        ("a b c d e", ["a b c d f"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("a b c d", ["a b c d e"], math.exp(1 - 5 / 4)),  # all precisions 1, too short
        # The second `a` matches in neither; the reference of the nearest length has 6 words.
        ("a b c d a", ["a b c d x y", "z a"], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)),
        ("A B, C d", ["a b, c D"], 1.0),  # case does not count
    ],
)
def test_bleu_by_hand(hypothesis: str, references: list[str], expected: float) -> None:
    assert score([hypothesis], [references])["BLEU"] == pytest.approx(100 * expected)


def test_bleu_is_of_the_corpus_not_a_mean_of_texts() -> None:
    counts = zip((4 + 2, 3 + 1, 2, 1), (5 + 2, 4 + 1, 3, 2), strict=True)
    expected = math.prod(hits / total for hits, total in counts) ** 0.25
    assert score(["a b c d e", "x y"], [["a b c d f"], ["x y"]])["BLEU"] == pytest.approx(100 * expected)


def test_nist_by_hand() -> None:
    # The references hold four words: a twice (1 bit), b and c once (2 bits); "a b" and "a c" tell 1 bit after a.
    # First text: a, b and "a b" match. Second: a alone. Precisions (1 + 2 + 1) / 4 and 1 / 2, no n-gram is longer.
    assert nist(words("a b", "a b"), [words("a b"), words("a c")]) == pytest.approx(4 / 4 + 1 / 2)
    # Half as long as the reference of four words of two bits each: the penalty halves the score at two thirds.
    penalty = math.exp(math.log(0.5) * (math.log(1 / 2) / math.log(2 / 3)) ** 2)
    assert nist(words("a b"), [words("a b c d")]) == pytest.approx(penalty * (2 + 2) / 2)
    assert nist([[]], [words("a b")]) == 0.0


def test_meteor_by_hand() -> None:
    assert meteor(words("a b c"), [words("a b c")]) == pytest.approx(100 * (1 - 0.5 * (1 / 3) ** 3))
    # Two of three words match in two chunks, the second by its stem: F = 2/3, the penalty is 0.5 * (2/2)^3.
    assert meteor(words("dogs x ran"), [words("dog ran y")]) == pytest.approx(100 * 2 / 3 * (1 - 0.5))
    assert meteor(words("q", "a b c"), [words("x"), words("z", "a b c")]) == pytest.approx(49.07, abs=0.01)


def test_meteor_matches_no_synonyms_and_needs_no_data() -> None:
    # Only `a` and `fine` match, in one chunk of two; a WordNet would know that a film is a movie.
    assert meteor(words("a fine film"), [words("a fine movie")]) == pytest.approx(100 * 2 / 3 * (1 - 0.5 / 2**3))


def test_rouge_l_takes_the_best_reference() -> None:
    expected = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    assert rouge_l(["a b c d"], [["a c d e f"]]) == pytest.approx(100 * expected)
    assert rouge_l(["a b c d"], [["x", "a c d e f", "b"]]) == pytest.approx(100 * expected)
    assert rouge_l(["Café"], [["caf é"]]) == 0.0


def test_ter_by_hand() -> None:
    assert score(["a b c d"], [["a b x d e"]])["TER"] == pytest.approx(100 * 2 / 5)  # one other, one missing
    assert score(["c d a b"], [["a b c d"]])["TER"] == pytest.approx(100 * 1 / 4)  # one shift
    assert score(["A b."], [["x y z", "a b ."]])["TER"] == 0.0  # the nearest; neither case nor spacing counts


def slow_cider(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Dense vectors over all n-grams of each order, as the paper writes it."""

    def counts(tokens: list[str], n: int) -> Counter[str]:
        return Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens))

    total = 0.0
    for n in (1, 2, 3, 4):
        everything = [*hypotheses, *(text for group in references for text in group)]
        grams = sorted({gram for text in everything for gram in counts(text, n)})
        holders = [sum(any(gram in counts(text, n) for text in group) for group in references) for gram in grams]
        idf = np.log(len(references) / np.maximum(1, holders))
        for hypothesis, group in zip(hypotheses, references, strict=True):
            for reference in group:
                h, r = (np.array([counts(t, n)[gram] for gram in grams]) * idf for t in (hypothesis, reference))
                norm = np.linalg.norm(h) * np.linalg.norm(r)
                cosine = np.minimum(h, r) @ r / norm if norm else 0.0
                penalty = np.exp(-((len(hypothesis) - len(reference)) ** 2) / 72)
                total += 10 / 4 * penalty * cosine / len(group) / len(hypotheses)
    return total


def test_cider_is_that_of_its_formula_and_of_the_coco_script() -> None:
    tokens = [text.split() for text in HYPOTHESES], [[text.split() for text in group] for group in REFERENCES]
    assert cider_d(*tokens) == pytest.approx(slow_cider(*tokens), rel=1e-12)
    assert cider_d(*tokens) == pytest.approx(COCO, rel=1e-12)


@given(CORPORA)
@settings(max_examples=30)
def test_cider_is_that_of_its_formula(corpus: list[tuple[str, list[str]]]) -> None:
    hypotheses = [tokenise(text) for text, _ in corpus]
    references = [[tokenise(text) for text in group] for _, group in corpus]
    assert cider_d(hypotheses, references) == pytest.approx(slow_cider(hypotheses, references), abs=1e-9)


@given(CORPORA, st.randoms())
@settings(max_examples=20)
def test_the_order_of_references_and_sources_changes_nothing(corpus: list[tuple[str, list[str]]], dice: object) -> None:
    expected = score([text for text, _ in corpus], [group for _, group in corpus])
    shuffled = [(text, dice.sample(group, len(group))) for text, group in dice.sample(corpus, len(corpus))]
    assert score([text for text, _ in shuffled], [group for _, group in shuffled]) == pytest.approx(expected)


def test_nothing_beats_the_reference_itself() -> None:
    best = score(TEXTS, [[text] for text in TEXTS])
    assert best == pytest.approx(
        {"BLEU": 100, "NIST": best["NIST"], "METEOR": 99.9, "ROUGE-L": 100, "CIDEr": 10, "TER": 0}, abs=0.1
    )
    for i, text in enumerate(TEXTS):
        worse = list(TEXTS)
        worse[i] = " ".join(reversed(text.split()[1:]))
        for name, value in score(worse, [[text] for text in TEXTS]).items():
            assert (value > best[name]) if name in LOWER_IS_BETTER else (value < best[name]), name


def test_an_empty_text_scores_nothing() -> None:
    scores = score(["", ""], [["a b c d"], ["e f g h", "e"]])
    edits = 100 * (4 + 1) / (4 + (4 + 1) / 2)  # to the nearest reference, for each token of an average one
    assert scores == {"BLEU": 0, "NIST": 0, "METEOR": 0, "ROUGE-L": 0, "CIDEr": 0, "TER": pytest.approx(edits)}


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "got 0 hypotheses and the references of 0 sources"),
        (["a"], [["a"], ["b"]], "got 1 hypotheses and the references of 2 sources"),
        (["a", "b"], [["a"], []], r"references\[1\] is \[\]; pass a list"),
        (["a", "b"], [["a"], "b"], r"references\[1\] is 'b'; pass a list"),
        (["a"], [["a", " "]], r"references\[0\] is \['a', ' '\]; .* none of them empty"),
    ],
)
def test_what_cannot_be_scored_is_refused(hypotheses: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(hypotheses, references)
