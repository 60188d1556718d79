"""CIFAR-10 with corrupted labels (Zhang et al., 2016; Figure 4b of the paper)."""
import numpy as np
from mmpretrain.datasets import CIFAR10
from mmpretrain.registry import DATASETS


@DATASETS.register_module()
class CorruptedCIFAR10(CIFAR10):
    """CIFAR10, a share of whose labels are drawn anew from all classes.

    Which images, and which labels they get, depends on the seed alone, and a
    larger share corrupts the same images and more.

    Args:
        corrupted: share of the images, in [0, 1]. A drawn label may be the true
            one, so a tenth of them keep theirs.
        seed: of the draw.
        **kwargs: those of CIFAR10.

    Raises:
        ValueError: for a share out of its range.
    """

    def __init__(self, corrupted: float = 0., seed: int = 0, **kwargs) -> None:
        if not 0 <= corrupted <= 1:
            raise ValueError(f'corrupted must lie in [0, 1], got {corrupted!r}')
        self.corrupted = corrupted
        self.seed = seed
        super().__init__(**kwargs)

    def load_data_list(self):
        images = super().load_data_list()
        random = np.random.default_rng(self.seed)
        order = random.permutation(len(images))
        labels = random.integers(len(self.CLASSES), size=len(images))
        for index in order[:round(self.corrupted * len(images))]:
            images[index]['gt_label'] = int(labels[index])
        return images
