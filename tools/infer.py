#!/usr/bin/env python3
"""Detect objects in images or folders of images: pictures, and results as COCO has them.

    python tools/infer.py photos/ --config configs/mask_rcnn_ce_r50.py \\
        --checkpoint work_dirs/mask_rcnn_ce_r50/epoch_24.pth
    python tools/infer.py a.jpg b.jpg --config CONFIG --checkpoint CHECKPOINT --fuse --out found

Writes OUT/vis/, with the names and subfolders of the images, and OUT/results.json, a list with
an entry for each detection of any score:

    image_id      index of the image, from 0, among all found, readable or not: paths in the
                  order given, folders sorted
    file_name     relative to the folder given; to the folder common to all, if several are
    category_id   index of the class, from 1, as checkpoints store names of classes but no ids:
                  for models of COCO's 80 classes it is not COCO's own id, which leaves gaps
    category      name of the class
    bbox          x, y, width, height, in pixels
    score         from 0 to 1
    segmentation  the mask as run lengths, which pycocotools.mask.decode reads; for models
                  with masks

Images that cannot be read are left out and named at the end; the exit status is then 1.
"""
import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

SUFFIXES = '.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', type=Path, nargs='+', metavar='IMAGE_OR_FOLDER',
                        help='folders are searched with all their subfolders')
    parser.add_argument('--config', required=True)
    parser.add_argument('--checkpoint', required=True)
    parser.add_argument('--out', type=Path, default=Path('inference'),
                        help='folder to write to (%(default)s)')
    parser.add_argument('--fuse', action='store_true',
                        help='fold batch norms and CE into the convolutions first (fuse_ce)')
    parser.add_argument('--device', help='cpu, cuda:0 ... (cuda:0 where there is one, else cpu)')
    parser.add_argument('--batch-size', type=int, default=4, help='images at once (%(default)s)')
    parser.add_argument('--score', type=float, default=0.3,
                        help='detections above it are drawn (%(default)s)')
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {arguments.batch_size}')
    return arguments


def find_images(paths, out):
    """Paths of all images, by their names relative to the folder that all paths have in common.

    Pictures of an earlier run, where OUT lies inside a folder given, are none of them.
    """
    pictures = Path(os.path.abspath(out / 'vis'))
    found, folders = [], []
    for given in paths:
        if not given.exists():
            sys.exit(f'no such image or folder: {given}')
        path = Path(os.path.abspath(given))
        if pictures in (path, *path.parents):
            sys.exit(f'{given} would be overwritten: pictures go to {pictures}. '
                     'Name another folder with --out.')
        candidates = sorted(files_below(path)) if path.is_dir() else [path]
        images = [file for file in candidates if file.suffix.lower() in SUFFIXES
                  and not file.is_dir() and pictures not in file.parents]
        if not images:
            sys.exit(f'no images in {given}: their names end in {", ".join(SUFFIXES)}')
        found += images
        folders.append(path if path.is_dir() else path.parent)
    common = Path(os.path.commonpath(folders))
    return {path.relative_to(common).as_posix(): path for path in found}


def files_below(folder):
    """Files in a folder and its subfolders; links are followed, each folder once."""
    seen = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        yield from (Path(path, name) for name in names)


def pick_device(name):
    import torch

    name = name or ('cuda:0' if torch.cuda.is_available() else 'cpu')
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        sys.exit(f'device {name} cannot be used: {str(error).splitlines()[0]}')
    return name


def read_config(path, checkpoint):
    """The config, or an exit with one line if it or the checkpoint cannot be used."""
    from cenet_mmdet.engine.weights import check_checkpoint
    from cenet_mmdet.models.build import load_config

    cfg = load_config(path)
    if (cfg.get('default_scope') or 'mmdet') != 'mmdet':
        sys.exit(f'{path} is not the config of a detector')
    check_checkpoint(checkpoint)
    cfg.model.backbone.init_cfg = None  # all weights are the checkpoint's
    for step in cfg.test_dataloader.dataset.pipeline:
        if not isinstance(step.type, str):  # a class, of which MMDetection expects the name
            step.type = step.type.__name__
    cfg.visualizer = dict(type='DetLocalVisualizer')  # pictures are written here, nowhere else
    return cfg


def build_inferencer(arguments):
    """MMDetection's inferencer, with all its weights from the checkpoint."""
    cfg = read_config(arguments.config, arguments.checkpoint)
    device = pick_device(arguments.device)
    from cenet_mmdet.models.build import load_weights

    logging.disable(logging.WARNING)  # that the config names no collate function
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a missing optional package, and missing weights
        from mmdet.apis import DetInferencer
        inferencer = DetInferencer(cfg, device=device, show_progress=False)
    logging.disable(logging.NOTSET)
    # DetInferencer would leave what the checkpoint lacks at random values.
    checkpoint = load_weights(inferencer.model, arguments.checkpoint, arguments.config)
    # the visualizer has the same dict
    inferencer.model.dataset_meta['classes'] = class_names(checkpoint, cfg)
    if arguments.fuse:
        fuse(inferencer.model, device)
    return inferencer


def class_names(checkpoint, cfg):
    """The checkpoint's, or the config's where it is a bare state dict."""
    from mmdet.registry import DATASETS

    meta = checkpoint.get('meta', {})
    meta = {**meta, **meta.get('dataset_meta', {})}
    names = meta.get('classes') or meta.get('CLASSES')  # the latter of older versions
    return names or DATASETS.build(
        {**cfg.test_dataloader.dataset, 'lazy_init': True}).metainfo['classes']


def fuse(model, device):
    """Fold backbone, neck and dense head."""
    import torch

    from cenet_mmdet.deploy import fuse_ce
    from cenet_mmdet.deploy.export import DensePart
    from cenet_mmdet.models.build import input_channels

    fuse_ce(DensePart(model), torch.randn(1, input_channels(model), 256, 256, device=device))


def is_readable(path):
    import cv2
    import mmcv

    try:
        return mmcv.imread(path) is not None
    except (OSError, cv2.error):
        return False


def entries(image_id, name, prediction, classes):
    """An image's detections in COCO's format, from the inferencer's dict."""
    for index, label in enumerate(prediction['labels']):
        left, top, right, bottom = prediction['bboxes'][index]
        entry = dict(image_id=image_id, file_name=name, category_id=label + 1,
                     category=classes[label], bbox=[left, top, right - left, bottom - top],
                     score=prediction['scores'][index])
        if 'masks' in prediction:
            entry['segmentation'] = prediction['masks'][index]
        yield entry


def detect(inferencer, images, arguments):
    """Write the pictures; return the detections, and names of images that cannot be read."""
    import mmcv
    from rich.progress import track

    warnings.filterwarnings('ignore', '.*out of bounds')  # boxes that end at the border do
    classes = inferencer.model.dataset_meta['classes']
    numbered = [(index, *item) for index, item in enumerate(images.items())]
    size = arguments.batch_size
    detections, unreadable = [], []
    # the inferencer keeps all pictures of a call in memory: one call for each batch
    for start in track(range(0, len(numbered), size), 'detecting'):
        batch = []
        for index, name, path in numbered[start:start + size]:
            if is_readable(path):
                batch.append((index, name, path))
            else:
                unreadable.append(name)
        if not batch:
            continue
        results = inferencer([str(path) for *_, path in batch], batch_size=size, return_vis=True,
                             pred_score_thr=arguments.score)
        for (index, name, _), prediction, picture in zip(
                batch, results['predictions'], results['visualization']):
            detections += entries(index, name, prediction, classes)
            # not left to the inferencer, which writes a/1.jpg and b/1.jpg to the same file
            mmcv.imwrite(picture[..., ::-1], str(arguments.out / 'vis' / name))
    return detections, unreadable


def main(arguments):
    from cenet_mmdet.utils.files import replacing

    if arguments.out.exists() and not arguments.out.is_dir():
        sys.exit(f'--out {arguments.out} is no folder')
    images = find_images(arguments.images, arguments.out)
    inferencer = build_inferencer(arguments)
    detections, unreadable = detect(inferencer, images, arguments)
    problem = f'{len(unreadable)} of {len(images)} images could not be read: ' \
              f'{", ".join(unreadable)}'
    if len(unreadable) == len(images):
        sys.exit(problem)
    results = arguments.out / 'results.json'
    with replacing(results) as partial:
        partial.write_text(json.dumps(detections))
    print(f'{len(detections)} detections in {len(images) - len(unreadable)} images: {results}, '
          f'pictures in {arguments.out / "vis"}')
    if unreadable:
        sys.exit(problem)


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
