"""Channel Equilibrium networks for MMDetection."""
from .layers import CE

__version__ = '0.1.0'
__all__ = ['CE']
