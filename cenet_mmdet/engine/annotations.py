"""What an annotation file in COCO's format may have wrong that shows late, or never.

Parsing one of COCO's size takes half a minute. So it is searched first, which takes a second, and
parsed only if something is suspicious.
"""
import difflib
import json
import mmap
import re
from functools import cached_property
from typing import Dict, Iterator, List, Optional, Sequence

from ..utils.files import PathLike

# What MMDetection or pycocotools read of an entry, and what to write there.
FIELDS = {
    'file_name': 'the path of the picture below data_prefix',
    'height': 'the height of the picture in pixels',
    'width': 'the width of the picture in pixels',
    'bbox': '[x, y, width, height] in pixels',
    'area': 'the area of the mask, or else width * height of the box, in pixels',
    'iscrowd': '0, or 1 for a region of many objects',
    'segmentation': 'polygons or run lengths; or leave out masks in the config',
}


class AnnotationFile:
    """A JSON file in COCO's format, read as little as possible."""

    def __init__(self, path: PathLike) -> None:
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
        """What would go wrong in a data set that was built, with labels in the order of classes."""
        yield from self._class_problems(classes)
        fields = ['iscrowd'] + ['segmentation'] * with_masks
        with self._bytes() as text:
            counts = {len(re.findall(rb'"%s"\s*:' % name.encode(), text))
                      for name in ['image_id', *fields]}
        if len(counts) > 1:
            yield from missing_fields('annotations', self._content['annotations'], fields)

    def build_problems(self, classes: Optional[Sequence[str]]) -> Iterator[str]:
        """What keeps a data set of these classes, or of all, from being built; a text for each."""
        if classes:
            yield from self._class_problems(classes)
        for kind, fields in (('images', ['file_name', 'height', 'width']),
                             ('annotations', ['bbox', 'area'])):
            yield from missing_fields(kind, self._content[kind], fields)

    def _class_problems(self, classes: Sequence[str]) -> Iterator[str]:
        if isinstance(classes, str):
            yield (f'classes is the text {classes!r}, each of whose letters counts as a class. '
                   f'Write a tuple: classes=({classes!r}, )')
            return
        names = [category['name'] for category in self.categories]
        unknown = [name for name in classes if name not in names]
        in_file = tuple(name for name in names if name in classes)
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f' (did you mean {nearest[0]!r}?)' if nearest else ''
            yield (f'{len(unknown)} of {len(classes)} classes are not in the file: '
                   f'{examples(unknown)}{hint}. It has {examples(names)}. Write the names as the '
                   'file has them: a missing one shifts the labels behind it')
        elif in_file != tuple(classes):
            first = next(i for i, (a, b) in enumerate(zip(classes, in_file)) if a != b)
            yield ('labels are numbered in the order of the file, not of classes: label '
                   f'{first} is {in_file[first]!r} in the file and {classes[first]!r} in classes. '
                   f'Write classes={in_file}, or reorder the categories of the file')

    @cached_property
    def _content(self) -> Dict:
        with open(self.path, encoding='utf-8') as file:
            return json.load(file)

    def _bytes(self) -> mmap.mmap:
        with open(self.path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def missing_fields(kind: str, entries: Sequence[Dict], fields: Sequence[str]) -> Iterator[str]:
    """A text for each of the `FIELDS` given that some images or annotations do not have."""
    for field in fields:
        ids = [entry['id'] for entry in entries if field not in entry]
        if ids:
            yield (f'{len(ids)} of {len(entries)} {kind} have no {field!r}, such as id '
                   f'{examples(ids)}. Add it: {FIELDS[field]}')


def examples(values: Sequence) -> str:
    """The first values, as '1, 2, 3 ...'."""
    return ', '.join(map(str, values[:3])) + ' ...' * (len(values) > 3)
