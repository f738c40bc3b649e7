"""Inception Score: how sure the classifier is of each image, and how varied the classes are."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax, xlogy

from bidm_cli.report.metrics.base import Estimate, SetStatistics, register_metric
from bidm_cli.report.metrics.moments import blocks

SPLIT = 5000
"""Images per score, whose mean is taken: guided-diffusion's evaluations/evaluator.py. Of 50,000 images these
are the ten splits of Salimans et al."""
DRAWS = 100


@register_metric("class_score", published=("inception_score",), features="inception")
def of_samples(samples: SetStatistics, reference: SetStatistics) -> Estimate | None:
    """:func:`inception_score` of the samples; None without images."""
    if samples.features is None or samples.classifier is None:
        return None
    return inception_score(samples.features, samples.classifier)


def inception_score(features: np.ndarray, classifier: np.ndarray) -> Estimate:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498) of features [N, D].

    Logits have no bias, as in the published code. The mean over splits of 5,000 images in their order; a last
    one counts as much, as in guided-diffusion. The bootstrap draws images with replacement in each split.

    Args:
        classifier: [classes, D].
    """
    starts = range(0, len(features), SPLIT)
    scores = np.array([_scores(features[start : start + SPLIT], classifier) for start in starts])
    drawn = scores[:, 1:].mean(axis=0)
    method = f"bootstrap, {DRAWS} draws of {len(features):,} samples"
    return Estimate(float(scores[:, 0].mean()), float(drawn.std(ddof=1)), method)


def _scores(features: np.ndarray, classifier: np.ndarray) -> np.ndarray:
    """Scores [1 + draws]: of the split itself, then of each draw from it."""
    count, generator = len(features), np.random.default_rng(0)
    repeated = generator.multinomial(count, np.full(count, 1 / count), DRAWS)
    weights = np.concatenate([np.ones((1, count)), repeated]) / count
    mean, entropy, done = np.zeros((DRAWS + 1, len(classifier))), np.zeros(DRAWS + 1), 0
    for block in blocks(features):
        logs = log_softmax(block @ classifier.T.astype(np.float64), axis=1)
        chances, part = np.exp(logs), weights[:, done : done + len(block)]
        mean += part @ chances
        entropy += part @ (chances * logs).sum(axis=1)
        done += len(block)
    return np.exp(entropy - xlogy(mean, mean).sum(axis=1))
