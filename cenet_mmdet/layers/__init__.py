"""Channel Equilibrium layers, and norms they are compared with; they need torch alone."""
from .ce import CE
from .iter_norm import DBN, IterNorm
from .sync_ce import SyncCE

__all__ = ['CE', 'DBN', 'IterNorm', 'SyncCE']
