# SPDX-License-Identifier: Apache-2.0
"""Two measures of a generated line against the true one: ROUGE-L over words, chrF over characters.

ROUGE-L is the reward of the preset `docsum` and, on other files, its yardstick. chrF looks at the
same lines through character n-grams, so that a policy which merely games the matching of words
shows. Both are a few lines of plain Python: no stemming, no stop words, nothing to install.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The text's words: maximal runs of ASCII letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of a and b, in O(len(a) * len(b)) time."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0  # the cell up and to the left, before this row overwrote it
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(candidate: str, truth: str) -> float:
    """ROUGE-L F1 in [0, 1]: harmonic mean of LCS / len(candidate) and LCS / len(truth), in words.

    0 where either side has no word. Symmetric; 1 exactly where both word sequences are equal.
    """
    a, b = words(candidate), words(truth)
    return 2 * lcs_length(a, b) / (len(a) + len(b)) if a and b else 0.0


def chrf(candidate: str, truth: str, *, order: int = 6, beta: float = 2.0) -> float:
    """chrF in [0, 1] (Popović 2015): F_beta of character n-grams without spaces, n = 1..order.

    Precision and recall are averaged over those n for which both sides have n-grams; 0 for none.
    """
    a, b = ("".join(text.split()) for text in (candidate, truth))
    orders = range(1, min(order, len(a), len(b)) + 1)
    if not orders:
        return 0.0
    precision = recall = 0.0
    for n in orders:
        grams_a = Counter(a[i : i + n] for i in range(len(a) - n + 1))
        grams_b = Counter(b[i : i + n] for i in range(len(b) - n + 1))
        common = (grams_a & grams_b).total()
        precision += common / (len(a) - n + 1) / len(orders)
        recall += common / (len(b) - n + 1) / len(orders)
    bottom = beta * beta * precision + recall
    return (1 + beta * beta) * precision * recall / bottom if bottom else 0.0
