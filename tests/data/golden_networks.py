"""The networks of golden_checkpoint.pth: one for each way to have CE in a checkpoint."""
from torch import nn

from cenet_mmdet import CE, CEResNet, insert_ce
from cenet_mmdet.models.norm_layers import CEBN, CEGN


def convolutions(*norms):
    layers = []
    for channels, norm in zip((3, 8, 12), norms):
        layers += [nn.Conv2d(channels, norm[0], 3), norm[1], nn.ReLU()]
    return nn.Sequential(*layers)


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
