"""The steps of a CE layer; `ce.py` puts them together.

| step | file |
|---|---|
| 1. moments of the feature map | `moments.py` |
| 2. the moments of the whole batch, over all ranks in SyncCE | `moments.py`, `all_reduce.py` |
| 3. a d x d operator per sample and group | `whitening.py`, `reweighting.py`, `mix.py` |
| 4. apply it to the feature map | `apply.py`, in half precision `half_precision.py` |

Only steps 1 and 4 read the feature map.
"""
