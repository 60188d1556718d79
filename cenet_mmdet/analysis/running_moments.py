"""Running moments in float64, with batches combined by the method of Chan et al. (1983)."""
from typing import Callable

import torch
from torch import Tensor


class RunningCovariance:
    """Mean and covariance of the columns of what a layer computes; statistics for a `Collector`.

    Args:
        rows: takes the layer's inputs and output and returns (..., M, C), of any floating point
            type.

    Attributes:
        count: number of rows.
        mean: (..., C), float64; NaN if there is no row.
        scatter: sum of the products of deviations, (..., C, C), float64.
        rounding: relative rounding error of the rows, from their type.
    """

    def __init__(self, rows: Callable[[tuple, Tensor], Tensor]) -> None:
        self._rows = rows
        self.count = 0
        self.mean = self.scatter = torch.tensor(float('nan'))
        self.rounding = 0.0

    def add(self, inputs: tuple, output: Tensor) -> None:
        rows = self._rows(inputs, output)
        count = rows.shape[-2]
        if not count:
            return
        self.rounding = max(self.rounding, torch.finfo(rows.dtype).eps)
        rows = rows.double()
        mean = rows.mean(-2, keepdim=True)
        scatter = _products(rows - mean)
        if self.count:
            shift = mean - self.mean.unsqueeze(-2)
            total = self.count + count
            scatter = self.scatter + scatter + _products(shift) * (self.count * count / total)
            mean = mean - shift * (self.count / total)
        self.mean, self.scatter = mean.squeeze(-2), scatter
        self.count += count

    @property
    def covariance(self) -> Tensor:
        """Biased, (..., C, C); NaN if there is no row."""
        return self.scatter / self.count if self.count else self.scatter


def _products(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def pixels(x: Tensor) -> Tensor:
    """Feature map (N, C, ...) -> (M, C), one row for each position of each image."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
