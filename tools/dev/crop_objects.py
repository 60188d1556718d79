#!/usr/bin/env python3
"""Cut the objects of a COCO-style set into ImageNet's layout, to pretrain a classifier on.

    python tools/dev/crop_objects.py data/demo data/demo_crops
    IMAGENET_ROOT=data/demo_crops python tools/train.py configs/demo/ce_r18_shapes_classifier.py

Writes OUT/train/CLASS/*.png and OUT/val/CLASS/*.png, square crops with some context, from
train2017/ and val2017/. Crowds and objects smaller than 16 pixels are left out.
"""
import argparse
import shutil
import sys
from pathlib import Path

SMALLEST = 16
CONTEXT = 1.2  # side of the crop, in sides of the object's box


def crop(image, box, size):
    """A square around the box (x, y, width, height), the border repeated, resized."""
    import cv2

    x, y, width, height = box
    side = max(width, height) * CONTEXT
    left, top = round(x + (width - side) / 2), round(y + (height - side) / 2)
    side = round(side)
    pad = max(0, -left, -top, left + side - image.shape[1], top + side - image.shape[0])
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    patch = padded[top + pad:top + pad + side, left + pad:left + pad + side]
    return cv2.resize(patch, (size, size), interpolation=cv2.INTER_AREA)


def write_split(coco_root, split, folder, size):
    """Number of crops written."""
    import cv2
    from pycocotools.coco import COCO
    from tqdm import tqdm

    coco = COCO(coco_root / 'annotations' / f'instances_{split}.json')
    for category in coco.cats.values():
        (folder / category['name']).mkdir(parents=True)
    written = 0
    for image_id in tqdm(sorted(coco.imgs), desc=split, unit='image', disable=None):
        image = cv2.imread(str(coco_root / split / coco.imgs[image_id]['file_name']))
        for entry in coco.imgToAnns[image_id]:
            if entry['iscrowd'] or min(entry['bbox'][2:]) < SMALLEST:
                continue
            name = coco.cats[entry['category_id']]['name']
            cv2.imwrite(str(folder / name / f'{entry["id"]:012d}.png'),
                        crop(image, entry['bbox'], size))
            written += 1
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('coco', type=Path, help='folder with annotations/, train2017/, val2017/')
    parser.add_argument('out', type=Path, help='folder to write; must not exist')
    parser.add_argument('--size', type=int, default=72, help='of the crops (%(default)s pixels)')
    arguments = parser.parse_args()
    for split in ('train2017', 'val2017'):
        annotations = arguments.coco / 'annotations' / f'instances_{split}.json'
        if not annotations.is_file():
            sys.exit(f"annotations not found: {annotations}. Name a folder in COCO's layout.")
    if arguments.out.exists():
        sys.exit(f'{arguments.out} exists. Name a new folder, or delete it.')
    # Written beside the target and moved in one step: never half a data set.
    partial = arguments.out.with_name(arguments.out.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    counts = {split: write_split(arguments.coco, f'{split}2017', partial / split, arguments.size)
              for split in ('train', 'val')}
    partial.rename(arguments.out)
    print(f'{arguments.out}: {counts["train"]} crops to train on, {counts["val"]} held out')


if __name__ == '__main__':
    main()
