"""Channel Equilibrium as its equations read, one after the other.

For reading, and for tests, benchmarks and documents to compare with. `ce.py` computes the same in
a small part of the time.
"""
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from .ce import CE


def reference_ce(ce: CE, xs: Sequence[Tensor]) -> Tuple[List[Tensor], Dict[str, Tensor]]:
    """CE's output in training or evaluation, and the statistics that it is made with.

    Args:
        ce: the layer that the parameters and running statistics are taken from. It stays as it is.
        xs: feature maps (N, C, H, W). Their statistics are taken together, as SyncCE takes those
            of all ranks, so heights and widths may differ.

    Returns:
        Outputs, in the shapes of `xs`; the mean (C, ), W (G, d, d) and s (scalar).
    """
    groups, d = ce.num_groups, ce.group_size
    maps = [x.flatten(2).unflatten(1, (groups, d)) for x in xs]  # (N, G, d, H * W)
    # v_n, the variance of each sample and channel; that of one pixel is 0
    variances = [m.var(-1) if m.shape[-1] > 1 else torch.zeros_like(m[..., 0]) for m in maps]
    statistics = dict(whitening=getattr(ce, 'running_whitening', None),
                      scale=getattr(ce, 'running_scale', None))
    if ce.training and ce.has_bd:
        # Eq. 5: Sigma, the covariance of each group over samples and pixels
        pixels = torch.cat([m.permute(1, 2, 0, 3).flatten(2) for m in maps], -1)  # (G, d, M)
        mean = pixels.mean(-1, keepdim=True)
        identity = torch.eye(d).to(pixels)
        sigma = (pixels - mean) @ (pixels - mean).mT / pixels.shape[-1] + ce.eps * identity
        # Eq. 6: Newton's iteration for the inverse root of Sigma / trace(Sigma)
        sigma = sigma / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        whitening = identity.expand(groups, d, d)
        for _ in range(ce.num_iters):
            whitening = 1.5 * whitening - 0.5 * whitening @ whitening @ whitening @ sigma
        statistics.update(mean=mean.flatten(), whitening=whitening)
    varied = [v for v, m in zip(variances, maps) if m.shape[-1] > 1]
    if ce.training and ce.has_ir and varied:
        statistics['scale'] = torch.cat(varied).mean().clamp(min=ce.eps).sqrt()
    outputs = []
    for x, m, variance in zip(xs, maps, variances):
        # Eq. 4: p_n = lambda W x_n + (1 - lambda) diag(w_n) x_n
        out = torch.zeros_like(m)
        if ce.has_bd:
            out = out + ce.ratio(x.dtype) * (statistics['whitening'] @ m)
        if ce.has_ir:
            # Eq. 8: w_n = F(v_n) / s
            weights = ce.reweighting(variance.flatten(1)).view(variance.shape) / statistics['scale']
            out = out + (1 - ce.ratio(x.dtype)) * weights.unsqueeze(-1) * m
        if ce.identity_start:  # not in the paper
            out = m + ce.strength * (out - m)
        outputs.append(out.view(x.shape))
    return outputs, statistics
