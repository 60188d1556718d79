"""What is measured of the channels of one or several models, and the file that keeps it."""
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from ..utils.files import replacing
from .channels import ChannelMagnitudes
from .collector import module_name
from .correlation import POINTS, ChannelCorrelations
from .gamma import GammaGrowth, gammas
from .learned_operators import ReweightingSpread, lambdas, spectra
from .modules import Layers, ce_layers, norms
from .norm_ce_pairs import norm_ce_pairs

# The first of them that an evaluator returns is drawn: mask AP, box AP or accuracy.
MAIN_METRICS = 'segm_mAP', 'bbox_mAP', 'mAP', 'top1'
Series = Dict[str, Optional[float]]  # by layer, in the order of depth


@dataclass
class Ablation:
    """Metrics by the share of zeroed channels; each of the curves is (seeds, fractions)."""
    fractions: List[float]
    curves: Dict[str, List[List[float]]]

    @property
    def main(self) -> str:
        """The metric to draw: see `MAIN_METRICS`, or the first there is."""
        found = (name for metric in MAIN_METRICS for name in self.curves if name.endswith(metric))
        return next(found, next(iter(self.curves)))


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
    ablation: Optional[Ablation] = None


@dataclass
class Report:
    """Of several models on the same images; magnitudes below the threshold are small."""
    images: int
    threshold: float
    models: Dict[str, ModelReport]

    def table(self) -> List[Tuple[str, ...]]:
        """Header and a row for each model, with means over its layers."""
        rows = [('model', 'inhibited', 'small |gamma|', 'mean |correlation|', 'lambda')]
        for name, model in self.models.items():
            means = [(model.small_gamma, '{:.1%}'), (model.correlation['output'], '{:.3f}'),
                     (model.bd_ratio, '{:.2f}')]
            rows.append((name, f'{model.inhibited_total:.1%}',
                         *(form.format(sum(series.values()) / len(series)) if series else '-'
                           for series, form in means)))
        return rows

    def write(self, path: Path) -> None:
        """Write the numbers as JSON, whole or not at all; those that are not finite as null."""
        numbers = json.loads(json.dumps(asdict(self)), parse_constant=lambda constant: None)
        with replacing(path) as partial:
            partial.write_text(json.dumps(numbers, indent=1))

    @classmethod
    def read(cls, path: Path) -> 'Report':
        """What `write` wrote."""
        report = cls(**json.loads(Path(path).read_text()))
        for name, numbers in report.models.items():
            numbers['ablation'] = numbers['ablation'] and Ablation(**numbers['ablation'])
            report.models[name] = ModelReport(**numbers)
        return report


def measure_models(backbones: Mapping[str, nn.Module], first: Mapping[str, Tensor],
                   batches: Callable[[str], Iterable[Tensor]],
                   threshold: float) -> Dict[str, ModelReport]:
    """Measure networks, all but the ablation, in one pass over the images for each.

    Correlations in a network without CE are those behind the norms that CE follows in the others.

    Args:
        backbones: networks in evaluation mode, by the names of the models.
        first: a batch of images for each, (N, C, H, W).
        batches: returns all batches for the network of a name.
        threshold: a smaller mean |activation| is inhibited, and a smaller |gamma| is small.

    Raises:
        InputError: a network has no rectifier, or neither CE nor norms; activations are not
            finite; the threshold is not positive.
    """
    pairs = {name: norm_ce_pairs(backbone, lambda b=backbone, x=first[name][:1]: b(x))
             for name, backbone in backbones.items()}
    reports = {}
    for name, backbone in backbones.items():
        places = {norm for found in pairs.values() if set(found) <= set(norms(backbone))
                  for norm in found}
        compared = None if ce_layers(backbone) or not places else list(map(re.escape, places))
        reports[name] = _measure(backbone, batches(name), pairs[name], compared, threshold)
    return reports


def _measure(backbone: nn.Module, batches: Iterable[Tensor], pairs: Mapping[str, str],
             correlated: Layers, threshold: float) -> ModelReport:
    gamma = gammas(backbone, pairs, threshold)
    effective = {n: g.effective_share for n, g in gamma.items() if g.effective is not None}
    collectors = dict(inhibited=ChannelMagnitudes(backbone),
                      correlation=ChannelCorrelations(backbone, correlated))
    if effective:
        collectors['growth'] = GammaGrowth(backbone, pairs)
    if any(ce.has_ir for ce in ce_layers(backbone).values()):
        collectors['spread'] = ReweightingSpread(backbone)
    images = 0
    with ExitStack() as stack, torch.no_grad():
        for collector in collectors.values():
            stack.enter_context(collector)
        for batch in batches:
            backbone(batch)
            images += len(batch)
    if images < 2:  # which have no spread
        collectors.pop('spread', None)
    results = {name: collector.result() for name, collector in collectors.items()}
    inhibited = results['inhibited']._replace(threshold=threshold)
    correlations, growth = results['correlation'], results.get('growth', {})
    called = dict.fromkeys(map(module_name, correlations))  # CE layers in the order of calls
    ratios, operators = lambdas(backbone), spectra(backbone)
    return ModelReport(
        inhibited=inhibited.shares, inhibited_total=inhibited.share,
        correlation={point: {label: points[point].mean for label, points in correlations.items()
                             if point in points and points[point].varying > 1}
                     for point in POINTS},
        small_gamma={name: found.share for name, found in gamma.items()},
        small_effective_gamma=effective,
        gamma_raised={name: found.share for name, found in growth.items()},
        gamma_growth={name: found.ratio for name, found in growth.items()},
        bd_ratio={name: ratios[name] for name in called if name in ratios},
        eigenvalues={name: operators[name].eigenvalues.flatten().tolist()
                     for name in called if name in operators},
        weights_spread={name: found.mean for name, found in results.get('spread', {}).items()})


def short_names(paths: Sequence[Path]) -> List[str]:
    """The shortest ends of paths, without .pth, that differ; an InputError if two are the same."""
    parts = [(path.with_suffix('') if path.suffix == '.pth' else path).absolute().parts
             for path in paths]
    for size in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(part[-size:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f'a path is given twice: {", ".join(map(str, paths))}')
