"""Measurements of the paper's figures, on any network, with CE and without.

| Figure | Measurement |
|---|---|
| 1a, 1b, 4d: inhibited channels | `ChannelMagnitudes` |
| Remark 1 and Proposition 1: gamma | `gammas`, `GammaGrowth`, `norm_ce_pairs` |
| 3: magnitude of features | `feature_magnitude` |
| 5: correlations | `ChannelCorrelations` |
| 1c, 4c: cumulative ablation | `ablation_curve`, `zero_channels` |
| what CE learned | `lambdas`, `spectra`, `ReweightingSpread` |

Those that are classes gather while the model runs, in a `with` statement: see `Collector`.
"""
from .ablation import ablation_curve, zero_channels
from .channels import ChannelMagnitudes, InhibitedChannels, feature_magnitude
from .collector import Collector
from .correlation import ChannelCorrelations, Correlation, ReweightingSpread, Spread
from .modules import norm_ce_pairs
from .parameters import Gamma, GammaGrowth, Growth, Spectrum, gammas, lambdas, spectra

__all__ = ['ChannelCorrelations', 'ChannelMagnitudes', 'Collector', 'Correlation', 'Gamma',
           'GammaGrowth', 'Growth', 'InhibitedChannels', 'ReweightingSpread', 'Spectrum',
           'Spread', 'ablation_curve', 'feature_magnitude', 'gammas', 'lambdas',
           'norm_ce_pairs', 'spectra', 'zero_channels']
