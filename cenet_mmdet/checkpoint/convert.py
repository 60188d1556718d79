"""Checkpoints made elsewhere: their entries under our names, and what does not fit."""
import re
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor

from ..layers import CE
from ..layers.released_keys import RELEASED_KEYS, rename_released_keys
from ..utils.errors import InputError

# An entry of a CE layer, as `layer1.0.ce.lambda_logit` and `ce1.x_weight` are.
CE_ENTRY = re.compile(r'(.*\.)?ce1?\.(?=[^.])')
# Classifiers as torchvision, the authors and mmpretrain name them.
CLASSIFIER = re.compile(r'(fc|head)\.')
LINEAR_CLASSIFIER = re.compile(r'(?:head\.)?(fc\.(?:weight|bias))$')
BLOCK = re.compile(r'layer(\d+)\.(\d+)\.')
REBUILD = ('Build the network as the one that was trained: same depth, ce_blocks, ce_stem and '
           'ce_cfg.')
USE_AS_IT_IS = ('Only networks with default options are converted; a CEResNet with the options of '
                'this one loads the file as it is.')


class CheckpointError(InputError):
    """A checkpoint is not what it should be; the message names the first entry that is not."""


def keep_backbone(state_dict: Dict[str, Tensor]) -> None:
    """Leave a backbone's entries only, under the backbone's own names; in place.

    Takes the backbone out of a whole model (mmpretrain's classifiers,
    MMDetection's detectors: `backbone.*`), and drops classifiers.
    """
    whole_model = any(key.startswith('backbone.') for key in state_dict)
    for key in list(state_dict):
        value = state_dict.pop(key)
        if whole_model and key.startswith('backbone.'):
            state_dict[key[len('backbone.'):]] = value
        elif not whole_model and not CLASSIFIER.match(key):
            state_dict[key] = value


def check_ce_entries(state_dict: Mapping[str, Tensor], prefix: str, layers: Dict[str, CE]) -> None:
    """Refuse a checkpoint whose CE layers are not those of the network.

    One without any CE entry is a plain network's, and none of our business.

    Args:
        state_dict: entries to be loaded, under our names or the authors'.
        prefix: of the network in it.
        layers: the network's CE layers by name.

    Raises:
        CheckpointError: for the first CE entry that is missing, too many, or of
            another shape.
    """
    found = {key[len(prefix):]: value for key, value in state_dict.items()
             if key.startswith(prefix) and CE_ENTRY.match(key[len(prefix):])}
    if not found:
        return
    expected = {}
    for name, layer in layers.items():
        rename_released_keys(found, f'{name}.')
        expected.update({f'{name}.{key}': value for key, value in layer.state_dict().items()})
    difference = first_difference(expected, found, optional='num_batches_tracked')
    if difference:
        raise CheckpointError(f'the CE layers of the checkpoint are not those of this network: '
                              f'{difference}. {REBUILD}')


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor],
                     optional: str = '') -> Optional[str]:
    """The first entry that differs in name or shape, in words; None if none does.

    Args:
        expected: entries of the network.
        found: entries of the checkpoint.
        optional: end of the names that a checkpoint may lack.
    """
    for name in [*expected, *found]:
        ours, theirs = _shape(expected, name), _shape(found, name)
        may_lack = optional and name.endswith(optional) and name not in found
        if ours != theirs and not may_lack:
            return f'{name} is {theirs} in the checkpoint and {ours} in the network'
    return None


def _shape(entries: Mapping[str, Tensor], name: str):
    return tuple(entries[name].shape) if name in entries else 'missing'


def to_ours(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The entries with the authors' CE layers renamed to ours; others as they are."""
    entries = dict(state_dict)
    for layer in ce_prefixes(entries):
        rename_released_keys(entries, layer)
    return entries


def to_released(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The entries with our CE layers renamed to the authors'; the inverse of `to_ours`."""
    theirs = {ours: released for released, ours in RELEASED_KEYS.items()}
    entries = {}
    for key, value in state_dict.items():
        match = CE_ENTRY.match(key)
        if match is None:
            entries[key] = value
            continue
        layer, name = match.group(), key[match.end():]
        if name == 'strength':
            raise CheckpointError(f"{key}: the authors' layer has no identity_start. Convert a "
                                  'network without it.')
        if name == 'num_batches_tracked':
            continue  # the authors' layer counts nothing
        if name == 'running_mean':
            groups, size = state_dict[f'{layer}running_whitening'].shape[:2]
            value = value.reshape(groups, size, 1)
        entries[layer + theirs.get(name, name)] = value
    return entries


def ce_prefixes(entries: Mapping[str, Tensor]) -> Tuple[str, ...]:
    """`layer1.0.ce.` and the like, for each CE layer that the entries hold."""
    matches = filter(None, map(CE_ENTRY.match, entries))
    return tuple(dict.fromkeys(match.group() for match in matches))


def named_tensors(checkpoint: Any) -> Dict[str, Tensor]:
    """Tensors of a state dict, or of the `state_dict` of a checkpoint, by name.

    Names lose the `module.` that parallel training puts before them.

    Raises:
        CheckpointError: if there are none.
    """
    is_dict = isinstance(checkpoint, Mapping)
    state_dict = checkpoint.get('state_dict', checkpoint) if is_dict else None
    if isinstance(state_dict, Mapping):
        tensors = {re.sub(r'^module\.', '', str(key)): value for key, value in state_dict.items()
                   if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError("it holds no tensors. Expected is a state dict, or a dict with one "
                          "under 'state_dict'.")


def split_model(entries: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """The backbone of a model, and its classifier as `fc.weight` and `fc.bias`, if it has one."""
    backbone = dict(entries)
    keep_backbone(backbone)
    heads = {key: LINEAR_CLASSIFIER.match(key) for key in entries}
    return backbone, {head.group(1): entries[key] for key, head in heads.items() if head}


def source_of(entries: Mapping[str, Tensor]) -> str:
    """What kind of file the entries are from, as far as their names tell."""
    if any(key.startswith('backbone.') for key in entries):
        return ('mmpretrain classifier' if 'head.fc.weight' in entries
                else 'model with a backbone, such as a detector')
    if any(key.endswith('.running_wm') for key in entries):
        return "authors' CE-ResNet"
    return 'CE-ResNet' if ce_prefixes(entries) else 'ResNet without CE'


def resnet_depth(entries: Mapping[str, Tensor], arch_settings: Mapping[int, Tuple]) -> int:
    """The depth of a ResNet, from its blocks.

    Args:
        entries: of the backbone alone.
        arch_settings: class and number of the blocks by depth, as MMDetection's ResNet has them.

    Raises:
        CheckpointError: if none of the depths has such blocks.
    """
    blocks = sorted({match.groups() for match in map(BLOCK.match, entries) if match})
    stages = sorted({stage for stage, _ in blocks})
    counts = tuple(sum(other == stage for other, _ in blocks) for stage in stages)
    is_bottleneck = 'layer1.0.conv3.weight' in entries
    for depth, (block, depth_counts) in arch_settings.items():
        if counts == depth_counts and is_bottleneck == (block.expansion > 1):
            return depth
    kind = 'of three convolutions' if is_bottleneck else 'of two convolutions'
    found = f'blocks {kind}, {counts} per stage' if counts else 'no entry of a block (layer1.0.*)'
    raise CheckpointError(f'it is no ResNet of depth {", ".join(map(str, arch_settings))}: '
                          f'it has {found}.')


def check_backbone(network: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> None:
    """Refuse a backbone that is neither the network nor the network without its CE layers.

    Args:
        network: entries of the network with CE.
        backbone: entries to compare, under our names.

    Raises:
        CheckpointError: for the first entry that is missing, too many, or of another shape.
    """
    if not ce_prefixes(backbone):
        network = {key: value for key, value in network.items() if not CE_ENTRY.match(key)}
    difference = first_difference(network, backbone, optional='num_batches_tracked')
    if difference:
        raise CheckpointError(f'{difference}. {USE_AS_IT_IS}')


def check_classifier(classifier: Mapping[str, Tensor], width: int) -> None:
    """Refuse a classifier that is no linear layer on `width` features; there may be none.

    Raises:
        CheckpointError: for the first entry that is missing or of another shape.
    """
    if not classifier:
        return
    classes = next(iter(classifier.values())).shape[:1]
    expected = {'fc.weight': torch.empty(*classes, width, device='meta'),
                'fc.bias': torch.empty(classes, device='meta')}
    difference = first_difference(expected, classifier)
    if difference:
        raise CheckpointError(f'the classifier is not one of this network: {difference}.')
