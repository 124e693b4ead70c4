"""CIDEr-D: how well a text agrees with several references, by TF-IDF-weighted n-grams.

Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015 (arXiv 1411.5726),
sections 3 and 5; D is the variant with clipping and a length penalty that the COCO and E2E scripts compute. Packages
that hold it bring Java, model weights or 100 MB with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # tokens of difference in length at which the penalty is exp(-1/2)

NGram = tuple[str, ...]
Vector = dict[NGram, float]


def cider_d(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The mean over a corpus; document frequencies come from its references, so a corpus of one text scores 0.

    Args:
        hypotheses: one tokenised text a source.
        references: for each, one tokenised text or more; those of one source are one document.

    Returns:
        Between 0 and 10.

    Example:
        >>> texts = [["a", "red", "cat", "sat"], ["two", "old", "dogs", "ran"]]
        >>> cider_d(texts, [[text] for text in texts])
        10.0
    """
    documents = Counter(ngram for group in references for ngram in {n for text in group for n in ngrams(text)})
    pairs = zip(hypotheses, references, strict=True)
    scores = [_agreement(hypothesis, group, documents, len(references)) for hypothesis, group in pairs]
    return sum(scores) / len(scores)


def ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    """Counts of all n-grams of the orders that CIDEr looks at."""
    return Counter(tuple(tokens[i : i + n]) for n in ORDERS for i in range(len(tokens) - n + 1))


def _agreement(
    hypothesis: Sequence[str], references: Sequence[Sequence[str]], documents: Counter[NGram], size: int
) -> float:
    ours = weights(ngrams(hypothesis), documents, size)
    total = 0.0
    for reference in references:
        penalty = math.exp(-((len(hypothesis) - len(reference)) ** 2) / (2 * SIGMA**2))
        theirs = weights(ngrams(reference), documents, size)
        total += penalty * sum(_cosine(_of_order(ours, n), _of_order(theirs, n)) for n in ORDERS)
    return 10 * total / (len(ORDERS) * len(references))


def weights(counts: Counter[NGram], documents: Counter[NGram], size: int) -> Vector:
    """Counts times log(size / documents that hold the n-gram), 1 where none does."""
    return {ngram: count * math.log(size / max(1, documents[ngram])) for ngram, count in counts.items()}


def _of_order(vector: Vector, n: int) -> Vector:
    return {ngram: weight for ngram, weight in vector.items() if len(ngram) == n}


def _cosine(ours: Vector, theirs: Vector) -> float:
    """Cosine with our weights clipped to theirs, so that repeating a word earns nothing."""
    product = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
    norms = _norm(ours.values()) * _norm(theirs.values())
    return product / norms if norms else 0.0


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
