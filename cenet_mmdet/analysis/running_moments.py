"""Running moments in float64, with the batches combined as by Chan et al. (1983)."""
import torch
from torch import Tensor


class RunningVariance:
    """Mean and sum of squared deviations of each column, over all rows that were added.

    Attributes:
        count: rows seen.
        mean: (..., C), float64.
        scatter: (..., C), float64; of RunningCovariance (..., C, C).
        rounding: relative rounding error of the values added, as their type has it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = None
        self.rounding = 0.0

    def add(self, rows: Tensor) -> None:
        """Add rows (..., M, C), of any floating point type."""
        count = rows.shape[-2]
        if not count:
            return
        self.rounding = max(self.rounding, torch.finfo(rows.dtype).eps)
        rows = rows.double()
        mean = rows.mean(-2, keepdim=True)
        scatter = self._product(rows - mean)
        if self.count:
            shift = mean - self.mean.unsqueeze(-2)
            total = self.count + count
            scatter = self.scatter + scatter + self._product(shift) * (self.count * count / total)
            mean = mean - shift * (self.count / total)
        self.mean, self.scatter = mean.squeeze(-2), scatter
        self.count += count

    @staticmethod
    def _product(deviations: Tensor) -> Tensor:
        return deviations.square().sum(-2)

    @property
    def moment(self) -> Tensor:
        """Biased variance, (..., C), or covariance, (..., C, C); NaN if no row was added."""
        return self.scatter / self.count if self.count else torch.tensor(float('nan'))


class RunningCovariance(RunningVariance):
    """The same with products of all columns."""

    @staticmethod
    def _product(deviations: Tensor) -> Tensor:
        return deviations.mT @ deviations


def pixels(x: Tensor) -> Tensor:
    """Feature map (N, C, ...) -> (M, C), one row for each position of each image."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])
