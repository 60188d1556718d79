"""Backbones with CE layers; these need MMDetection, those in `pretrain` mmpretrain."""
from .ce_mobilenet_v2 import CEMobileNetV2
from .ce_resnet import CEResNet

__all__ = ['CEMobileNetV2', 'CEResNet']
