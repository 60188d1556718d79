"""CE folded into the layers in front of it, for inference (section 3.1 of the paper)."""
from .convolution import CEConv2d
from .fuse import fuse_ce

__all__ = ['CEConv2d', 'fuse_ce']
