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

# What MMDetection or pycocotools read of each entry, beside ids. A data set cannot be built without
# those of the first two lines; the others are missed in the first step or evaluation.
IMAGE_FIELDS = ('file_name', 'height', 'width')
NEEDED = ('bbox', 'area')
MISSED_LATE = ('iscrowd', 'segmentation')
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
            start = text.rfind(b'"categories"')  # they stand behind the annotations as a rule
            found = re.match(rb'"categories"\s*:\s*(\[[^]]*\])', text[start:start + (1 << 20)])
        try:
            return json.loads(found[1])
        except (TypeError, ValueError):  # a list inside, or the word in another place
            return self._content['categories']

    @cached_property
    def file_names(self) -> List[str]:
        """Names of the images; some may have JSON's escapes."""
        with self._bytes() as text:
            return [name.decode() for name in re.findall(rb'"file_name"\s*:\s*"([^"]*)"', text)]

    def problems(self, classes: Sequence[str], with_masks: bool) -> Iterator[str]:
        """What would go wrong in a data set that was built, a text for each.

        Args:
            classes: of the data set, in the order of the labels.
            with_masks: whether masks are loaded.
        """
        yield from self._class_problems(classes)
        fields = MISSED_LATE if with_masks else MISSED_LATE[:1]
        with self._bytes() as text:
            annotations = len(re.findall(rb'"image_id"\s*:', text))
            counts = [len(re.findall(rb'"%s"\s*:' % name.encode(), text)) for name in fields]
        if any(count != annotations for count in counts):
            yield from self._missing('annotations', fields)

    def build_problems(self, classes: Sequence[str]) -> Iterator[str]:
        """What keeps a data set from being built, a text for each."""
        yield from self._class_problems(classes)
        yield from self._missing('images', IMAGE_FIELDS)
        yield from self._missing('annotations', NEEDED)

    def _class_problems(self, classes: Sequence[str]) -> Iterator[str]:
        if isinstance(classes, str):
            yield (f'classes is the text {classes!r}, and each of its letters counts as a class. '
                   f'Write a tuple: classes=({classes!r}, )')
            return
        names = [category['name'] for category in self.categories]
        unknown = [name for name in classes if name not in names]
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], names, n=1)
            yield (f'{len(unknown)} of {len(classes)} classes are not in the file: '
                   f'{_some(unknown)}' + (f' (did you mean {nearest[0]!r}?)' if nearest else '')
                   + f'. It has {_some(names)}. Write the names as the file has them: a missing '
                   'one shifts the labels behind it')
            return
        in_file = tuple(name for name in names if name in classes)
        if in_file != tuple(classes):
            first = next(i for i, (a, b) in enumerate(zip(classes, in_file)) if a != b)
            yield ('labels are numbered in the order of the file, not of classes: label '
                   f'{first} is {in_file[first]!r} in the file and {classes[first]!r} in classes. '
                   f'Write classes={in_file}, or put the categories of the file into the order of '
                   'classes')

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
