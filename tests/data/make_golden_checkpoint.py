"""Wrote golden_checkpoint.pth, once: small networks with CE, trained a little, and their outputs.

    python tests/data/make_golden_checkpoint.py

Kept to show how the file came about. Running it again would replace what is meant to stay.
"""
from pathlib import Path

import torch
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.models.norm_layers import CEBN, CEGN

FILE = Path(__file__).parent / 'golden_checkpoint.pth'


def convolutions(*norms):
    layers = []
    for channels, norm in zip((3, 8, 12), norms):
        layers += [nn.Conv2d(channels, norm[0], 3), norm[1], nn.ReLU()]
    return nn.Sequential(*layers)


# one for each way to have CE in a checkpoint
NETWORKS = {
    'CEResNet': lambda: CEResNet(18, base_channels=4, stem_channels=4, frozen_stages=-1,
                                 norm_eval=False),
    'CEResNet, SyncCE, deep stem, BD alone': lambda: CEResNet(
        18, base_channels=4, stem_channels=4, deep_stem=True, frozen_stages=-1, norm_eval=False,
        ce_blocks=[(0, ), (0, 1), (), ()], ce_cfg=dict(type='SyncCE', bd_ratio=1.)),
    'insert_ce': lambda: insert_ce(
        convolutions((8, nn.BatchNorm2d(8)), (12, nn.GroupNorm(3, 12))), '.*'),
    'norms': lambda: convolutions((8, CEBN(8)), (12, CEGN(12, num_groups=3))),
    'layers': lambda: convolutions(
        (8, CE(8, group_size=4)), (12, CE(12, group_size=None, bd_ratio=0.))),
}


def main():
    if FILE.exists():
        raise SystemExit(f'{FILE} is there, and is meant to stay as it is')
    torch.manual_seed(0)
    golden = {}
    for name, build in NETWORKS.items():
        network = build()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        for _ in range(5):
            features = network(torch.randn(4, 3, 32, 32))
            optimizer.zero_grad()
            sum(feature.square().mean() for feature in as_tuple(features)).backward()
            optimizer.step()
        state_dict = {key: value.clone() for key, value in network.state_dict().items()}
        image = torch.randn(2, 3, 32, 32)
        outputs = evaluate(network, image)
        golden[name] = dict(state_dict=state_dict, image=image, outputs=outputs)
    torch.save(golden, FILE)


@torch.no_grad()
def evaluate(network, image):
    """In float64, so that the outputs do not depend on the machine."""
    network.double().eval()
    return as_tuple(network(image.double()))


def as_tuple(features):
    return features if isinstance(features, tuple) else (features, )


if __name__ == '__main__':
    main()
