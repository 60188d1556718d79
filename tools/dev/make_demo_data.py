#!/usr/bin/env python3
"""Generate a small COCO-style instance segmentation set of textured shapes.

    python tools/dev/make_demo_data.py data/demo
    python tools/dev/make_demo_data.py /tmp/shapes --train 64 --val 16 --seed 7

Five classes of shapes on textured backgrounds, with occlusion, small objects,
crowd regions (a swarm of dots under one iscrowd annotation) and images with
nothing to find. Colour tells nothing about the class. The same arguments give
the same files. The layout is COCO's: train2017/, val2017/, annotations/.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

CLASSES = ('disk', 'square', 'triangle', 'star', 'cross')
SIZE = 320
MAX_TURN = np.radians(20)
EMPTY_SHARE = 0.05
CROWD_SHARE = 0.15
SMALL_SHARE = 0.15
# An object of which less than this is visible is not annotated, and not drawn.
MIN_VISIBLE = 0.35


def polar(radii, first):
    """Corners (len(radii), 2) evenly spaced in angle from `first`, in image coordinates."""
    angles = first + np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]


UP = -np.pi / 2
ARM = 0.35  # half the width of a cross's arm
# Corners of the upright shapes, within a circle of radius 1.
OUTLINES = {
    'disk': polar([1] * 40, UP),
    'square': polar([1] * 4, UP / 2),
    'triangle': polar([1] * 3, UP),
    'star': polar([1, .42] * 5, UP),
    'cross': np.concatenate([np.array([[ARM, -.9], [ARM, -ARM], [.9, -ARM]]) @ turn for turn in (
        np.eye(2), [[0, 1], [-1, 0]], -np.eye(2), [[0, -1], [1, 0]])]),
}


def shape_mask(label, rng, radius, centre):
    """Boolean mask (SIZE, SIZE) of one shape, turned a little."""
    angle = rng.uniform(-MAX_TURN, MAX_TURN)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = centre + radius * OUTLINES[CLASSES[label]] @ turn
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def texture(rng, height=SIZE, width=SIZE):
    """A coloured texture (height, width, 3): smooth blotches, stripes and grain."""
    coarse = rng.uniform(-1, 1, (rng.integers(3, 12), rng.integers(3, 12), 3)).astype(np.float32)
    blotches = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 60)
    rows, columns = np.ogrid[:height, :width]
    phase = (rows * np.sin(angle) + columns * np.cos(angle)) * (2 * np.pi / period)
    stripes = np.sin(phase)[..., None] * rng.uniform(0, 25, 3)
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(2, 12)
    colour = rng.uniform(40, 215, 3)
    return (colour + blotches * rng.uniform(5, 40) + stripes + grain).astype(np.float32)


def paint(image, mask, rng):
    """Cover the mask's part of the image with a new texture."""
    column, row, width, height = cv2.boundingRect(mask.astype(np.uint8))
    box = np.s_[row:row + height, column:column + width]
    image[box][mask[box]] = texture(rng, height, width)[mask[box]]


def draw_image(rng):
    """One image and its instances: (uint8 BGR image, [(label, visible mask, is crowd)])."""
    image = texture(rng)
    instances = []
    if rng.random() >= EMPTY_SHARE:
        for _ in range(rng.integers(2, 7)):
            add_shape(image, instances, rng)
        if rng.random() < CROWD_SHARE:
            add_crowd(image, instances, rng)
    image = cv2.GaussianBlur(image, (3, 3), 0)  # no object betrays itself by a hard edge
    return np.clip(image, 0, 255).astype(np.uint8), instances


def add_shape(image, instances, rng):
    """Paint one shape over what is there, unless it would hide another too far."""
    small = rng.random() < SMALL_SHARE
    radius = rng.uniform(10, 18) if small else rng.uniform(26, 84)
    label = int(rng.integers(len(CLASSES)))
    mask = shape_mask(label, rng, radius, rng.uniform(radius * 0.6, SIZE - radius * 0.6, 2))
    hidden = [(other & ~mask).sum() < MIN_VISIBLE * other.sum() for _, other, _ in instances]
    if any(hidden):
        return
    instances[:] = [(lab, other & ~mask, crowd) for lab, other, crowd in instances]
    instances.append((label, mask, False))
    paint(image, mask, rng)


def add_crowd(image, instances, rng):
    """A swarm of tiny disks, annotated as one crowd region where it covers nothing else."""
    taken = np.any([mask for _, mask, _ in instances], axis=0)
    swarm = np.zeros_like(taken)
    centre = rng.uniform(50, SIZE - 50, 2)
    for _ in range(rng.integers(14, 28)):
        swarm |= shape_mask(0, rng, rng.uniform(3, 5), centre + rng.normal(0, 22, 2))
    swarm &= ~taken
    if swarm.any():
        instances.append((0, swarm, True))
        paint(image, swarm, rng)


def segmentation(mask, crowd):
    """COCO's form: polygons for an object, an uncompressed RLE for a crowd."""
    if crowd:
        flat = mask.ravel(order='F')
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        # runs alternate between outside and inside, and begin outside
        return dict(size=list(mask.shape), counts=[0, *runs] if flat[0] else runs)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL,
                                   cv2.CHAIN_APPROX_SIMPLE)
    return [c.ravel().tolist() for c in contours if len(c) >= 4]


def annotation(identity, image_id, label, mask, crowd):
    """One entry of COCO's `annotations`, or None where too little is visible to outline."""
    outline = segmentation(mask, crowd)
    if not outline:
        return None
    # Box and area of the outline, not of the mask: slivers have no polygon.
    rle = mask_utils.frPyObjects(outline, SIZE, SIZE)
    rle = rle if crowd else mask_utils.merge(rle)
    return dict(id=identity, image_id=image_id, category_id=label + 1, iscrowd=int(crowd),
                area=float(mask_utils.area(rle)), bbox=mask_utils.toBbox(rle).tolist(),
                segmentation=outline)


def write_split(root, split, count, seed):
    folder = root / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index in tqdm(range(count), desc=split, unit='image', disable=None):
        # One generator an image: the first images stay the same when more are asked for.
        rng = np.random.default_rng([seed, split == 'val2017', index])
        picture, instances = draw_image(rng)
        name = f'{index + 1:012d}.jpg'
        cv2.imwrite(str(folder / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append(dict(id=index + 1, file_name=name, width=SIZE, height=SIZE))
        for label, mask, crowd in instances:
            entry = annotation(len(annotations) + 1, index + 1, label, mask, crowd)
            if entry:
                annotations.append(entry)
    categories = [dict(id=i + 1, name=name, supercategory='shape')
                  for i, name in enumerate(CLASSES)]
    path = root / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(info=dict(description=f'shapes, seed {seed}'), licenses=[],
                                    images=images, annotations=annotations,
                                    categories=categories)))


def generate(root, train, val, seed):
    """Write the set to `root`; what is already there under the same recipe is kept."""
    recipe = json.dumps(dict(train=train, val=val, seed=seed))
    marker = root / 'recipe.json'
    if marker.exists() and marker.read_text() == recipe:
        return
    if root.exists() and any(root.iterdir()) and not marker.exists():
        sys.exit(f'{root} holds something else than a demo set. '
                 'Name an empty or a new folder, or delete it.')
    # Written beside the target and moved in one step: never half a data set.
    partial = root.with_name(root.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    write_split(partial, 'train2017', train, seed)
    write_split(partial, 'val2017', val, seed)
    (partial / 'recipe.json').write_text(recipe)
    shutil.rmtree(root, ignore_errors=True)
    partial.rename(root)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to write, new or made by this tool')
    parser.add_argument('--train', type=positive, default=640, help='training images (%(default)s)')
    parser.add_argument('--val', type=positive, default=120, help='held-out images (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the pictures (%(default)s)')
    arguments = parser.parse_args()
    generate(arguments.out, arguments.train, arguments.val, arguments.seed)


if __name__ == '__main__':
    main()
