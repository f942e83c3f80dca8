"""A classifier's logits as scores of its labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.bundle import Classes


@dataclass(frozen=True)
class Classification:
    """What a classifier says of one text.

    Attributes:
        label: the label with the highest score.
        scores: every label's score, in the order of config.json's id2label. They are probabilities that sum to one;
            where its problem_type is "multi_label_classification", or there is one label only, a probability of each
            label's own; where it is "regression", the logits themselves.
        logits: the head's outputs, in the same order.

    """

    label: str
    scores: dict[str, float]
    logits: tuple[float, ...]

    @property
    def score(self) -> float:
        """The label's score."""
        return self.scores[self.label]


def classify(logits: NDArray[np.float32], classes: Classes) -> Classification:
    """The scores of logits [labels]."""
    x = logits.astype(np.float64)
    if classes.function_to_apply == "softmax":
        x = np.exp(x - x.max())
        x /= x.sum()
    elif classes.function_to_apply == "sigmoid":
        x = np.exp(-np.logaddexp(0, -x))
    scores = dict(zip(classes.labels, x.tolist(), strict=True))
    return Classification(classes.labels[int(x.argmax())], scores, tuple(logits.tolist()))
