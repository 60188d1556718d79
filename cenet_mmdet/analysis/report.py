"""What is measured of the channels of one or several models, and the file that keeps it."""
import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from ..utils.files import replacing
from .channels import ChannelMagnitudes
from .collector import module_name
from .correlation import POINTS, ChannelCorrelations, ReweightingSpread
from .modules import Layers, ce_layers, norm_ce_pairs, norms
from .parameters import GammaGrowth, gammas, lambdas, spectra

Series = Dict[str, Optional[float]]  # by layer, in the order of depth


@dataclass
class ModelReport:
    """Of one model. Layers where fewer than two channels vary have no correlation."""
    inhibited: Series  # share of channels behind each rectifier
    inhibited_total: float  # the same among the channels of all rectifiers together
    correlation: Dict[str, Series]  # mean |correlation| by point, see `ChannelCorrelations`
    small_gamma: Series  # share of channels of each norm
    small_effective_gamma: Series  # |W gamma|, of norms that CE with BD follows
    gamma_raised: Series  # share of channels in which BD increases |gamma| (Proposition 1)
    gamma_growth: Series  # |gamma_hat| / |gamma|, the l2 norms over the channels of a CE layer
    bd_ratio: Series  # lambda
    eigenvalues: Dict[str, List[float]]  # of W, of all groups of a CE layer
    weights_spread: Series  # deviation of IR's weights over images, divided by their mean
    ablation: Optional[Dict[str, Any]] = None  # fractions, and curves (seeds, fractions) by metric


@dataclass
class Report:
    """Of several models on the same images; values below the threshold are small."""
    images: int
    threshold: float
    models: Dict[str, ModelReport]

    def series(self, measurement: str) -> Dict[str, Any]:
        """One of the measurements, by model."""
        return {name: getattr(model, measurement) for name, model in self.models.items()}

    def table(self) -> List[Tuple[str, ...]]:
        """Header and a row for each model, with means over its layers."""
        def mean(series: Any, form: str) -> str:
            return format(sum(series.values()) / len(series), form) if series else '-'

        return [('model', 'inhibited', 'small |gamma|', 'mean |correlation|', 'lambda'),
                *((name, f'{model.inhibited_total:.1%}', mean(model.small_gamma, '.1%'),
                   mean(model.correlation['output'], '.3f'), mean(model.bd_ratio, '.2f'))
                  for name, model in self.models.items())]

    def write(self, path: Path) -> None:
        """Write the numbers as JSON, whole or not at all; those that are not finite as null."""
        numbers = json.loads(json.dumps(asdict(self)), parse_constant=lambda constant: None)
        with replacing(path) as partial:
            partial.write_text(json.dumps(numbers, indent=1))


def measure_models(backbones: Mapping[str, nn.Module], first: Mapping[str, Tensor],
                   batches: Callable[[str], Iterable[Tensor]],
                   threshold: float) -> Dict[str, ModelReport]:
    """Measure networks in evaluation mode, all but the ablation, in one pass for each.

    By the names of the models: `first` holds some images, (N, C, H, W), and `batches` returns all.
    In a network without CE, correlations are those behind the norms that CE follows in the others.
    An InputError is raised if a network has no rectifier, or neither CE nor norms, or computes
    values that are not finite; and unless the threshold is positive.
    """
    pairs = {name: norm_ce_pairs(backbone, partial(backbone, first[name][:1]))
             for name, backbone in backbones.items()}
    reports = {}
    for name, backbone in backbones.items():
        places = [re.escape(norm) for found in pairs.values() for norm in found
                  if set(found) <= set(norms(backbone))]
        layers = None if ce_layers(backbone) else places or None
        reports[name] = _measure(backbone, batches(name), pairs[name], layers, threshold)
    return reports


def _measure(backbone: nn.Module, batches: Iterable[Tensor], pairs: Mapping[str, str],
             layers: Layers, threshold: float) -> ModelReport:
    gamma = gammas(backbone, pairs, threshold)
    magnitudes, correlation = ChannelMagnitudes(backbone), ChannelCorrelations(backbone, layers)
    growth, spread = GammaGrowth(backbone, pairs), ReweightingSpread(backbone)
    with magnitudes, correlation, growth, spread, torch.no_grad():
        for batch in batches:
            backbone(batch)
    inhibited, correlations = magnitudes.result(threshold), correlation.result()
    grown, ratios, spectrum = growth.result(), lambdas(backbone), spectra(backbone)
    called = dict.fromkeys(map(module_name, correlations))  # CE layers in the order of calls
    return ModelReport(
        inhibited=inhibited.shares, inhibited_total=inhibited.share,
        correlation={point: {label: points[point].mean for label, points in correlations.items()
                             if point in points and points[point].varying > 1}
                     for point in POINTS},
        small_gamma={name: found.share for name, found in gamma.items()},
        small_effective_gamma={name: found.effective_share for name, found in gamma.items()
                               if found.effective is not None},
        gamma_raised={name: found.share for name, found in grown.items()},
        gamma_growth={name: found.ratio for name, found in grown.items()},
        bd_ratio={name: ratios[name] for name in called if name in ratios},
        eigenvalues={name: spectrum[name].eigenvalues.flatten().tolist()
                     for name in called if name in spectrum},
        weights_spread={name: found.mean for name, found in spread.result().items()})


def short_names(paths: Sequence[Path]) -> List[str]:
    """The shortest ends of paths, without .pth, that differ; an InputError if two are the same."""
    parts = [Path(str(path).removesuffix('.pth')).absolute().parts for path in paths]
    for size in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(part[-size:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f'a path is given twice: {", ".join(map(str, paths))}')
