"""The command cenet-mmdet. It starts without torch, which no module imports at its top."""
from .main import main, parser

__all__ = ['main', 'parser']
