#!/usr/bin/env python3
"""Convert checkpoints of ResNets, with or without CE, to this package's format or the authors'.

    python tools/convert_checkpoint.py resnet50_ce.pth.tar weights/ce_resnet50.pth
    python tools/convert_checkpoint.py work_dirs/imagenet/epoch_100.pth ce.pth.tar --to released

Takes the authors' CE-ResNet-50, backbones of this package, classifiers of
mmpretrain, detectors of MMDetection and torchvision's ResNets, of depth 18, 34,
50, 101 or 152 and with the default options. Every entry is compared with the
network's before anything is written. CEResNet loads all these files without
conversion, too; what this makes of them holds the weights alone and opens with
torch.load(..., weights_only=True).

No code that SRC may hold is run.
"""
import argparse
import zipfile
from pathlib import Path

import torch

FORMAT_VERSION = 1
NOTE = 'Backbone as CEResNet names it, and the classifier, if any, as fc.weight and fc.bias.'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', type=Path, metavar='SRC', help='checkpoint to read')
    parser.add_argument('dst', type=Path, metavar='DST',
                        help='file to write; replaced if it exists and the conversion succeeds')
    parser.add_argument('--to', choices=FORMATS, default='ours',
                        help="format of DST: this package's or the authors' (%(default)s)")
    return parser.parse_args()


def check_paths(src, dst):
    """Refuse files that cannot be what they are named for."""
    from cenet_mmdet.utils.errors import InputError

    if not dst.parent.is_dir():
        raise InputError(f'folder not found: {dst.parent}. Create it, or name a file in another '
                         'one.')
    if dst.is_dir():
        raise InputError(f'{dst} is a folder. Give the path of the file to write.')
    if dst.exists() and src.exists() and dst.samefile(src):
        raise InputError(f'SRC and DST are the same file: {src}. Give another path for DST.')


def read(path):
    """What torch.save wrote, with the checksums compared, which torch.load does not do."""
    from cenet_mmdet.checkpoint.load import CheckpointError, load

    checkpoint = load(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f'not a checkpoint: {path} is damaged (wrong checksum in '
                                  f'{damaged}). Get or write it again.')
    return checkpoint


def recognise(checkpoint):
    """The weights under our names, and what is known of them, or a CheckpointError."""
    from cenet_mmdet import CEResNet
    from cenet_mmdet.checkpoint import convert as checkpoints

    entries = checkpoints.named_tensors(checkpoint)
    backbone, classifier = checkpoints.split_model(entries)
    depth = checkpoints.resnet_depth(backbone, CEResNet.arch_settings)
    with torch.device('meta'):
        network = CEResNet(depth)
    backbone = checkpoints.to_ours(backbone)
    checkpoints.check_backbone(network.state_dict(), backbone)
    checkpoints.check_classifier(classifier, network.feat_dim)
    in_order = {name: backbone[name] for name in network.state_dict() if name in backbone}
    return alone({**in_order, **classifier}), dict(
        depth=depth, ce_layers=len(checkpoints.ce_prefixes(backbone)),
        source=checkpoints.source_of(entries))


def alone(entries):
    """Copies that share no storage: torch.save writes the whole storage of a view."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in entries.items()}


def as_ours(state_dict, meta):
    return dict(state_dict=state_dict, meta=dict(meta, format_version=FORMAT_VERSION, note=NOTE))


def as_released(state_dict, meta):
    from cenet_mmdet.checkpoint.convert import CheckpointError, to_released

    if not meta['ce_layers']:
        raise CheckpointError("it holds no CE layers, without which the authors' format is just "
                              "torchvision's. Leave out --to released.")
    return dict(epoch=0, model=f'resnet{meta["depth"]}', state_dict=to_released(state_dict))


def write(checkpoint, path):
    """All of the file or nothing."""
    from cenet_mmdet.utils.errors import InputError, first_line
    from cenet_mmdet.utils.files import replacing

    try:
        with replacing(path) as partial, open(partial, 'wb') as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        raise InputError(f'cannot write {path} ({first_line(error)}). Make sure that the disk has '
                         'space and that the folder can be written to.') from error


def summary(state_dict, meta):
    classes = len(state_dict.get('fc.bias', ()))
    return (f'recognised: {meta["source"]}, depth {meta["depth"]}, '
            f'{f"classifier of {classes} classes" if classes else "no classifier"}\n'
            'CE layers: '
            f'{meta["ce_layers"] or "none, those of CEResNet will start at their initial values"}')


def main(arguments):
    from cenet_mmdet.checkpoint.convert import CheckpointError

    check_paths(arguments.src, arguments.dst)
    checkpoint = read(arguments.src)
    try:
        state_dict, meta = recognise(checkpoint)
        meta['source_file'] = arguments.src.name
        converted = FORMATS[arguments.to](state_dict, meta)
    except CheckpointError as error:
        raise CheckpointError(f'cannot convert {arguments.src}: {error}') from None
    write(converted, arguments.dst)
    print(summary(state_dict, meta))
    print(f'written: {arguments.dst}, {len(converted["state_dict"])} entries')


FORMATS = dict(ours=as_ours, released=as_released)

if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
