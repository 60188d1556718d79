"""What an annotation file in COCO's format may have wrong that shows late, or never.

A file of COCO's size takes half a minute to parse. So it is searched for what matters first, which
takes about a second, and parsed only if that finds something suspicious.
"""
import difflib
import json
import mmap
import os
import re
from collections import Counter
from functools import cached_property
from typing import Dict, Iterator, List, Sequence, Union

# What MMDetection or pycocotools read of each entry, beside ids and boxes.
IMAGE_FIELDS = ('file_name', 'height', 'width')
ANNOTATION_FIELDS = ('bbox', 'area', 'iscrowd')
EXAMPLES = 3


class AnnotationFile:
    """An annotation file, read as little as possible.

    Args:
        path: of a JSON file in COCO's format.
    """

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        self.path = str(path)

    @cached_property
    def categories(self) -> List[Dict]:
        """The file's categories, in its order."""
        with self._bytes() as text:
            for match in re.finditer(rb'"categories"\s*:\s*\[', text):
                end = text.find(b']', match.end())
                try:
                    return json.loads(text[match.end() - 1:end + 1])
                except ValueError:  # a list inside, or the word in another place
                    continue
        return self._content['categories']

    @cached_property
    def file_names(self) -> List[str]:
        """Names of the images; some may have JSON's escapes."""
        with self._bytes() as text:
            return [name.decode() for name in re.findall(rb'"file_name"\s*:\s*"([^"]*)"', text)]

    def problems(self, classes: Sequence[str], with_masks: bool) -> Iterator[str]:
        """What would go wrong with these classes, a text for each.

        Args:
            classes: of the data set, in the order of the labels.
            with_masks: whether masks are loaded.
        """
        yield from self._class_problems(classes)
        fields = ANNOTATION_FIELDS + ('segmentation', ) * with_masks
        with self._bytes() as text:
            counts = {name: len(re.findall(rb'"%s"\s*:' % name.encode(), text))
                      for name in ('image_id', *fields, *IMAGE_FIELDS)}
        annotations, images = counts['image_id'], counts['file_name']
        if (any(counts[name] != annotations for name in fields)
                or any(counts[name] != images for name in IMAGE_FIELDS)):
            yield from self._missing('images', IMAGE_FIELDS)
            yield from self._missing('annotations', fields)

    def _class_problems(self, classes: Sequence[str]) -> Iterator[str]:
        if isinstance(classes, str):
            yield (f'classes is the text {classes!r}, of which each letter counts as a class. Write '
                   f'a tuple: classes=({classes!r}, )')
            return
        names = [category['name'] for category in self.categories]
        unknown = [name for name in classes if name not in names]
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], names, n=1)
            yield (f'{len(unknown)} of {len(classes)} classes are not in the file: '
                   f'{_some(unknown)}' + (f' (did you mean {nearest[0]!r}?)' if nearest else '')
                   + f'. It has {_some(names)}. Write the names as the file has them: labels behind '
                   'a missing one are those of other classes')
            return
        in_file = tuple(name for name in names if name in classes)
        if in_file != tuple(classes):
            first = next(i for i, (a, b) in enumerate(zip(classes, in_file)) if a != b)
            yield (f'labels are numbered in the order of the file, not of classes: label {first} is '
                   f'{in_file[first]!r} in the file and {classes[first]!r} in classes. Write classes='
                   f'{in_file}, or put the categories of the file into the order of classes')

    def _missing(self, kind: str, fields: Sequence[str]) -> Iterator[str]:
        lacking = Counter(name for entry in self._content[kind] for name in fields
                          if name not in entry)
        for name, count in lacking.items():
            ids = [entry['id'] for entry in self._content[kind] if name not in entry]
            yield (f'{count} of {len(self._content[kind])} {kind} have no {name!r}, such as id '
                   f'{_some(ids)}. Add it: {FIXES[name]}')

    @cached_property
    def _content(self) -> Dict:
        with open(self.path, encoding='utf-8') as file:
            return json.load(file)

    def _bytes(self) -> mmap.mmap:
        with open(self.path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


FIXES = {
    'file_name': 'the path of the picture below data_prefix',
    'height': 'the height of the picture in pixels',
    'width': 'the width of the picture in pixels',
    'bbox': '[x, y, width, height] in pixels',
    'area': 'the area of the mask, or else width * height of the box, in pixels',
    'iscrowd': '0, or 1 for a region of many objects',
    'segmentation': 'polygons or run lengths; or load no masks',
}


def _some(values: Sequence) -> str:
    """'1, 2, 3 ...'."""
    return ', '.join(map(str, values[:EXAMPLES])) + ' ...' * (len(values) > EXAMPLES)
