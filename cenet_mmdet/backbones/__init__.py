"""Backbones with CE layers; they need MMDetection."""
from .ce_resnet import CEResNet

__all__ = ['CEResNet']
