"""The releases that are tested together; the set-up reads this without any package installed."""
from typing import NamedTuple, Sequence, Tuple


class Stack(NamedTuple):
    """What is pinned, as pip's requirements."""
    oldest: Tuple[int, int]  # Python
    newest: Tuple[int, int]
    setuptools: str
    torch: str
    numpy: str
    # opencv-python (asked for by mmcv) and its headless twin share one folder. Installed
    # last, the headless one, first here, needs no libGL, so a bare server works too.
    opencv: Tuple[str, str]
    mmengine: str
    mmcv: str
    mmdet: str
    mmpretrain: str

    @property
    def basics(self) -> Tuple[str, ...]:
        """What is installed before mmcv is built."""
        return ('pip>=23.2', self.setuptools, 'wheel', 'ninja', 'psutil')

    @property
    def pins(self) -> Tuple[str, ...]:
        """All that holds in the finished environment."""
        return (*self.basics, self.torch, self.numpy, *self.opencv, self.mmengine, self.mmcv,
                self.mmdet, self.mmpretrain)

    @property
    def pythons(self) -> str:
        """'3.10 to 3.13'."""
        return ' to '.join('.'.join(map(str, version)) for version in (self.oldest, self.newest))

    def runs_on(self, version: Sequence) -> bool:
        """Whether there are builds for this `sys.version_info`."""
        return self.oldest <= tuple(version[:2]) <= self.newest


STACKS = {
    'maintained': Stack(
        oldest=(3, 10), newest=(3, 13),
        # mmcv's build needs setuptools >= 80; pkg_resources is gone from 81 on.
        setuptools='setuptools>=80,<81', torch='torch==2.13.0', numpy='numpy>=2.2,<2.3',
        opencv=('opencv-python-headless==4.12.0.88', 'opencv-python==4.12.0.88'),
        mmengine='onedl-mmengine==0.10.12', mmcv='onedl-mmcv==2.3.6',
        mmdet='onedl-mmdetection==3.5.1', mmpretrain='onedl-mmpretrain==1.3.6'),
    'legacy': Stack(
        oldest=(3, 9), newest=(3, 11),
        setuptools='setuptools<81', torch='torch==2.1.2', numpy='numpy<2',
        opencv=('opencv-python-headless==4.11.0.86', 'opencv-python==4.11.0.86'),
        mmengine='mmengine==0.10.7', mmcv='mmcv==2.1.0',
        mmdet='mmdet==3.3.0', mmpretrain='mmpretrain==1.2.0'),
}
