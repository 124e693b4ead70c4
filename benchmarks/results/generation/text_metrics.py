"""BLEU, NIST, METEOR, ROUGE-L, CIDEr and TER of generated texts against several references each.

Everything is compared in lower case, and but for TER on the same tokens, those of mteval-v13a, so the figures do not
depend on how a text was spaced by hand. sacrebleu, nltk and rouge-score come with `pip install 'peft-pst[benchmarks]'`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from .cider import cider_d

LOWER_IS_BETTER = frozenset({"TER"})
_13A = Tokenizer13a()
_NIST_ORDER = 5

Tokens = list[str]


class _NoSynonyms:
    """Stands where METEOR asks WordNet, whose data is no package; nothing is downloaded."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score one text a source against that source's references; their order changes nothing.

    Args:
        hypotheses: the generated texts; an empty one is scored as such.
        references: for each, one text or more, none empty; their number may differ.

    Returns:
        - BLEU: 0 to 100, sacrebleu's corpus BLEU-4; the reference length is the closest one's.
        - NIST: 0 up, NLTK's corpus NIST-5; for each order the best reference counts.
        - METEOR: 0 to 100, the mean over texts of the best reference's, by NLTK: METEOR of Lavie & Agarwal (2007) with
          exact and Porter-stem matches and no synonyms. Not METEOR 1.5 (Java), whose figures are far lower: 45.0
          where this is 78.6, for one human reference of E2E's test set against the others.
        - ROUGE-L: 0 to 100, the mean of the F1 of the best reference, by rouge-score. The E2E script instead takes the
          best precision and the best recall apart, and weighs recall by 1.2.
        - CIDEr: 0 to 10, CIDEr-D with the document frequencies of these references.
        - TER: 0 up, lower is better, 100 times sacrebleu's edits of the nearest reference per token of an average one,
          with Tercom's own separation of punctuation. It takes nearly all of the time: minutes for E2E's test set.

    Raises:
        ValueError: if there is nothing to score, the numbers differ, or a source has no references or an empty one.

    Example:
        >>> texts = ["A red cat sat on the mat.", "Two old dogs ran to the park."]
        >>> {name: round(value, 1) for name, value in score(texts, [[text] for text in texts]).items()}
        {'BLEU': 100.0, 'NIST': 3.9, 'METEOR': 99.9, 'ROUGE-L': 100.0, 'CIDEr': 10.0, 'TER': 0.0}
    """
    _check(hypotheses, references)
    tokens = [tokenise(text) for text in hypotheses]
    token_references = [[tokenise(text) for text in group] for group in references]
    streams = _streams(references)
    return {
        "BLEU": BLEU(lowercase=True, force=True).corpus_score(hypotheses, streams).score,
        "NIST": nist(tokens, token_references),
        "METEOR": meteor(tokens, token_references),
        "ROUGE-L": rouge_l(hypotheses, references),
        "CIDEr": cider_d(tokens, token_references),
        "TER": TER(normalized=True).corpus_score(hypotheses, streams).score,
    }


def tokenise(text: str) -> Tokens:
    """Lower-case tokens of mteval-v13a.

    Example:
        >>> tokenise("It's £10.50, Café!")
        ["it's", '£10.50', ',', 'café', '!']
    """
    return _13A(text.lower()).split()


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """NLTK's corpus NIST; an order of which no text has an n-gram adds nothing, where NLTK would divide by zero."""
    order = min(_NIST_ORDER, max(map(len, hypotheses)))
    return corpus_nist(references, hypotheses, order) if order else 0.0


def meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """100 times the mean of NLTK's METEOR of the best reference, without synonyms."""
    pairs = zip(references, hypotheses, strict=True)
    return _mean(100 * meteor_score(group, text, wordnet=_NoSynonyms()) for group, text in pairs)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """100 times the mean F1 of the longest common subsequence with the best reference."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Lower13A())
    pairs = zip(references, hypotheses, strict=True)
    return _mean(100 * scorer.score_multi(group, text)["rougeL"].fmeasure for group, text in pairs)


class _Lower13A:
    """rouge-score's own tokens are ASCII alone, which splits `café`."""

    def tokenize(self, text: str) -> Tokens:
        return tokenise(text)


def _streams(references: Sequence[Sequence[str]]) -> list[Any]:
    """sacrebleu's form: the first references of all sources, then the second, with None where there is none.

    It takes None, though its type hints do not say so.
    """
    count = max(map(len, references))
    return [[group[i] if i < len(group) else None for group in references] for i in range(count)]


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"got {len(hypotheses)} hypotheses and the references of {len(references)} sources; pass one hypothesis a "
            "source, and at least one."
        )
    for i, group in enumerate(references):
        if isinstance(group, str) or not group or not all(text.strip() for text in group):
            raise ValueError(f"references[{i}] is {group!r}; pass a list of one text or more, none of them empty.")


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
