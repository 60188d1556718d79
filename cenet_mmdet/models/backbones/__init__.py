"""Backbones with CE layers that need MMDetection; `models.mmpretrain` has those on mmpretrain's."""
from .ce_mobilenet_v2 import CEMobileNetV2
from .ce_resnet import CEResNet

__all__ = ['CEMobileNetV2', 'CEResNet']
