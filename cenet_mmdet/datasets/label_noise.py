"""Corrupted labels (Zhang et al., 2016; Figure 4b of the paper)."""
from typing import Sequence

import numpy as np


def corrupt_labels(labels: Sequence[int], share: float, seed: int, num_classes: int) -> np.ndarray:
    """The labels (N, ), a share of which is drawn anew from all classes.

    The seed alone decides which images are drawn and which labels they get: a larger share
    corrupts the same images and more. A drawn label may be the true one.

    Raises:
        ValueError: for a share that is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f'the share of corrupted labels must be in [0, 1], got {share!r}')
    corrupted = np.array(labels)
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(labels))[:round(share * len(labels))]
    corrupted[chosen] = random.integers(num_classes, size=len(labels))[chosen]
    return corrupted
