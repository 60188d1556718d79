"""Checkpoints made elsewhere: their entries under this package's names, and what does not fit."""
import re
from collections import Counter
from typing import Any, Dict, Mapping, Optional, Tuple

from torch import Tensor, nn

from ..layers.released_keys import RELEASED_KEYS, rename_released_keys
from ..utils.errors import InputError

Entries = Mapping[str, Tensor]  # of a state dict
# The layer in an entry of CE, such as `layer1.0.ce.lambda_logit` or `ce1.x_weight`.
CE_LAYER = re.compile(r'(.*\.)?ce1?\.(?=[^.])')
# Classifiers as torchvision, the authors and mmpretrain name them.
CLASSIFIER = re.compile(r'(fc|head)\.')


class CheckpointError(InputError):
    """A checkpoint does not fit; the message names the first entry that does not."""


def named_tensors(checkpoint: Any) -> Dict[str, Tensor]:
    """The tensors of a state dict, or of a dict with one, without the prefix `module.`."""
    if isinstance(checkpoint, Mapping):
        checkpoint = checkpoint.get('state_dict', checkpoint)
    items = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
    tensors = {str(key).removeprefix('module.'): value for key, value in items
               if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError("it holds no tensors. Expected is a state dict, or a dict with one "
                              "under 'state_dict'.")
    return tensors


def under(prefix: str, entries: Mapping[str, Any]) -> Dict[str, Any]:
    """The entries whose names start with a prefix, without it."""
    return {key[len(prefix):]: value for key, value in entries.items() if key.startswith(prefix)}


def backbone_entries(entries: Entries) -> Dict[str, Tensor]:
    """The entries of a backbone alone: `backbone.*` of a whole model, or all but a classifier's."""
    return under('backbone.', entries) or {key: value for key, value in entries.items()
                                           if not CLASSIFIER.match(key)}


def split_model(entries: Entries) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """The backbone of a model, and its classifier as `fc.weight` and `fc.bias`, if it has one."""
    return backbone_entries(entries), {
        name: value for key, value in entries.items()
        for name in re.findall(r'^(?:head\.)?(fc\.(?:weight|bias))$', key)}


def ce_entries(entries: Entries) -> Dict[str, Tensor]:
    """The entries of CE layers, or of the layers that `ce_cfg` puts in their place."""
    return {key: value for key, value in entries.items() if CE_LAYER.match(key)}


def ce_prefixes(entries: Entries) -> Tuple[str, ...]:
    """The prefix of each CE layer in the entries, such as `layer1.0.ce.`."""
    return tuple(dict.fromkeys(CE_LAYER.match(key)[0] for key in ce_entries(entries)))


def to_ours(state_dict: Entries) -> Dict[str, Tensor]:
    """The entries with the authors' CE layers renamed to ours; others as they are."""
    entries = dict(state_dict)
    for layer in ce_prefixes(entries):
        rename_released_keys(entries, layer)
    return entries


def to_released(state_dict: Entries) -> Dict[str, Tensor]:
    """The entries with our CE layers renamed to the authors'; the inverse of `to_ours`."""
    entries = dict(state_dict)
    for layer in ce_prefixes(entries):
        if f'{layer}strength' in entries:
            raise CheckpointError(f"{layer}strength: the authors' layer has no identity_start. "
                                  'Convert a network without it.')
        entries.pop(f'{layer}num_batches_tracked', None)  # the authors' layer counts nothing
        mean = f'{layer}running_mean'
        if mean in entries:
            groups, size = entries[f'{layer}running_whitening'].shape[:2]
            entries[mean] = entries[mean].reshape(groups, size, 1)
        for released, ours in RELEASED_KEYS.items():
            if layer + ours in entries:
                entries[layer + released] = entries.pop(layer + ours)
    return entries


def source_of(entries: Entries) -> str:
    """The kind of network that the entries are from, as far as their names tell."""
    if under('backbone.', entries):
        return ('mmpretrain classifier' if 'head.fc.weight' in entries
                else 'model with a backbone, such as a detector')
    if any(key.endswith('.running_wm') for key in entries):
        return "authors' CE-ResNet"
    return 'CE-ResNet' if ce_entries(entries) else 'ResNet without CE'


def resnet_depth(entries: Entries, arch_settings: Mapping[int, Tuple]) -> int:
    """The depth in MMDetection's `ResNet.arch_settings` that has the blocks of a backbone."""
    blocks = sorted({block for key in entries for block in re.findall(r'^layer(\d)\.(\d+)\.', key)})
    counts = tuple(Counter(stage for stage, _ in blocks).values())
    is_bottleneck = 'layer1.0.conv3.weight' in entries
    for depth, (block, depth_counts) in arch_settings.items():
        if counts == depth_counts and is_bottleneck == (block.expansion > 1):
            return depth
    found = (f'blocks of {"three" if is_bottleneck else "two"} convolutions, {counts} per stage'
             if counts else 'no entry of a block (layer1.0.*)')
    raise CheckpointError(f'it is no ResNet of depth {", ".join(map(str, arch_settings))}: it has '
                          f'{found}.')


def first_difference(network: Entries, checkpoint: Entries) -> Optional[str]:
    """The first entry that differs in name or shape, in words; None if none does."""
    ours, theirs = ({name: tuple(value.shape) for name, value in entries.items()}
                    for entries in (network, checkpoint))
    for name in [*ours, *theirs]:
        # old checkpoints and the authors' count nothing
        may_lack = name.endswith('num_batches_tracked') and name not in theirs
        if ours.get(name) != theirs.get(name) and not may_lack:
            return (f'{name} is {theirs.get(name, "missing")} in the checkpoint and '
                    f'{ours.get(name, "missing")} in the network')
    return None


def check_backbone(network: Entries, backbone: Entries) -> None:
    """Refuse a backbone that is neither the network nor the network without its CE layers."""
    if not ce_entries(backbone):
        network = {key: value for key, value in network.items() if not CE_LAYER.match(key)}
    difference = first_difference(network, backbone)
    if difference:
        raise CheckpointError(f'{difference}. Only networks with default options are converted; a '
                              'CEResNet with the options of this one loads the file as it is.')


def check_classifier(classifier: Entries, width: int) -> None:
    """Refuse a classifier that is no linear layer on `width` features; there may be none."""
    if classifier:
        classes = len(next(iter(classifier.values())))
        linear = nn.ModuleDict(dict(fc=nn.Linear(width, classes, device='meta')))
        difference = first_difference(linear.state_dict(), classifier)
        if difference:
            raise CheckpointError(f'the classifier is not one of this network: {difference}.')
