"""CE folded into the layers in front of it, for inference (section 3.1 of the paper).

Users call `fuse_ce`. `tracing.py` finds the layers that belong together, `convolution.py` folds
them, `compare.py` compares the model with what it was.
"""
from .convolution import CEConv2d
from .fuse import fuse_ce

__all__ = ['CEConv2d', 'fuse_ce']
