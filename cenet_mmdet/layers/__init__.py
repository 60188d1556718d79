"""Channel Equilibrium layers; they need torch and nothing else."""
from .ce import CE

__all__ = ['CE']
