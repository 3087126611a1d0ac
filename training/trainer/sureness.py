"""From which confidence on a label is sure, so that a promised part of the sure ones is right.

The threshold is found on images that the network was not trained on, which are a sample: so it is
lowered only as long as an exact binomial test (the bound of Clopper and Pearson 1934) shows that
the promise holds at every step. Testing in an order that is fixed beforehand, and ending with the
first failure, needs no correction for the number of tests ("fixed sequence" in Angelopoulos et al.
2021, Learn then Test): with 95 % probability the promise holds on images like these.

One threshold serves all classes. A tenth of FER+ has too few images for one of each class: none
could be shown to keep the promise for sadness, disgust, fear and contempt.
"""

from __future__ import annotations

import math

from efficientface_deploy.vision.preprocess import Float32Array
from efficientface_deploy.workbench.metrics import IndexArray

PRECISION = 0.95
DOUBT = 0.05  # probability that the promise does not hold, at most

START = 200  # sure labels of the first test: of a few, one that is wrong would end the search
TRIED = tuple(step / 100 for step in range(99, 0, -1))


def fit_threshold(
    probabilities: Float32Array, labels: IndexArray, precision: float = PRECISION
) -> float:
    """The lowest confidence above which the promise holds.

    Args:
        probabilities: float32 (N, C), of images that the network was not trained on.
        labels: Integers (N,).
        precision: Part of the sure labels that is to be right.

    Returns:
        0 to 1; 1 where these images cannot show that it holds for any.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    found = 1.0
    for limit in TRIED:
        sure = confidence > limit
        count, wrong = int(sure.sum()), int((sure & ~right).sum())
        if count < min(START, len(labels)):
            continue
        if not keeps_promise(count, wrong, precision):
            break
        found = limit
    return found


def keeps_promise(count: int, wrong: int, precision: float) -> bool:
    """Whether so few errors would be unlikely if the precision were lower than promised.

    Args:
        count: Number of sure labels.
        wrong: How many of them are wrong.
        precision: The promise.
    """

    def log_probability(errors: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(errors + 1) - math.lgamma(count - errors + 1)
        return ways + errors * math.log1p(-precision) + (count - errors) * math.log(precision)

    return math.fsum(math.exp(log_probability(errors)) for errors in range(wrong + 1)) <= DOUBT
