"""CE folded into the convolutions in front of it, for inference (section 3.1 of the paper).

`fuse_ce` is what users call; `convolution.py` computes, `pairs.py` finds what to fold.
"""
from .convolution import CEConv2d
from .fuse import fuse_ce

__all__ = ['CEConv2d', 'fuse_ce']
