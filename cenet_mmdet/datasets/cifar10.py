"""CIFAR-10 for mmpretrain, with corrupted labels (Figure 4b of the paper)."""
from pathlib import Path
from typing import Any, Dict, List

from mmpretrain.datasets import CIFAR10
from mmpretrain.registry import DATASETS

from ..utils.errors import InputError
from .label_noise import corrupt_labels


@DATASETS.register_module()
class CorruptedCIFAR10(CIFAR10):
    """CIFAR10, a share of whose labels are drawn anew from all classes.

    Args:
        corrupted: share of the images, in [0, 1]; see `corrupt_labels`.
        seed: of the draw.
        check_md5: False reads batches that are not the original's, such as images that
            were JPEGs on the way.
        **kwargs: those of CIFAR10.

    Raises:
        ValueError: for a share out of its range.
        InputError: for batches that are not the original's, unless `check_md5` is False.
    """

    def __init__(self, corrupted: float = 0., seed: int = 0, check_md5: bool = True,
                 **kwargs: Any) -> None:
        self.corrupted = corrupted
        self.seed = seed
        self.check_md5 = check_md5
        super().__init__(**kwargs)

    def _check_integrity(self) -> bool:
        folder = Path(self.data_prefix['root'], self.base_folder)
        if not all((folder / name).is_file() for name, _ in self.train_list + self.test_list):
            return False  # mmpretrain downloads them, or says that they are missing
        if self.check_md5 and not super()._check_integrity():
            raise InputError(f'{folder} does not hold the original CIFAR-10: the checksums differ. '
                             'Set check_md5=False to use it nevertheless')
        return True

    def load_data_list(self) -> List[Dict]:
        images = super().load_data_list()
        labels = corrupt_labels([image['gt_label'] for image in images], self.corrupted,
                                self.seed, len(self.CLASSES))
        for image, label in zip(images, labels.tolist()):
            image['gt_label'] = label
        return images
