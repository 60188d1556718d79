"""Channel Equilibrium layers; they need torch and nothing else."""
from .ce import CE
from .sync_ce import SyncCE

__all__ = ['CE', 'SyncCE']
