"""Looks at data and weights before a run starts: a hook for MMEngine's runner."""
import os
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..utils.errors import InputError
from .annotations import EXAMPLES, AnnotationFile
from .weights import weight_problems

SIZES = 50  # images whose size is compared


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stops a run before its first iteration if its data or weights go wrong in silence.

        custom_hooks = [dict(type='DataCheckHook')]

    It looks at what the runner has built, on the main process: data sets in COCO's format, inside
    wrappers such as ConcatDataset and RepeatDataset too (classes, fields, images, sizes of 50
    images), MMDetection's CocoMetric (whether its annotation file is the data set's), and the
    checkpoints that `init_cfg` and `load_from` name. docs/limits.md lists what it does not look at.

    Raises:
        InputError: with a line for each problem, which names the file and the fix.
    """
    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        _refuse(lambda: weight_problems(runner.model, runner.cfg))

    def before_train(self, runner) -> None:
        _refuse(lambda: [*_loader_problems('train', runner.train_dataloader),
                         *_loop_problems('val', runner.val_loop)])

    def before_val(self, runner) -> None:
        if runner.train_loop is None:
            _refuse(lambda: _loop_problems('val', runner.val_loop))

    def before_test(self, runner) -> None:
        _refuse(lambda: _loop_problems('test', runner.test_loop))


def _refuse(find_problems: Callable[[], Iterable[str]]) -> None:
    """Raise an InputError on all ranks if the main process finds a problem."""
    found = [list(dict.fromkeys(find_problems())) if is_main_process() else None]
    broadcast_object_list(found)
    if found[0]:
        raise InputError('\n'.join(f'- {problem}' for problem in found[0]))


def _loop_problems(name: str, loop) -> Iterator[str]:
    if loop is not None:
        yield from _loader_problems(name, loop.dataloader)
        for dataset in leaves(loop.dataloader.dataset):
            for metric in loop.evaluator.metrics:
                yield from evaluator_problems(f'{name}_evaluator', metric, dataset)


def _loader_problems(name: str, loader) -> Iterator[str]:
    for dataset in leaves(loader.dataset):
        yield from dataset_problems(f'{name}_dataloader', dataset)


def leaves(dataset) -> Iterator:
    """The data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    for wrapped in filter(None, inner):
        yield from leaves(wrapped)


def dataset_problems(name: str, dataset) -> Iterator[str]:
    """What is wrong with a built data set; those of other formats than COCO's are left alone.

    Args:
        name: where it stands in the config.
        dataset: a CocoDataset of MMDetection, or of a class derived from it.
    """
    from mmdet.datasets import CocoDataset

    if not isinstance(dataset, CocoDataset) or '://' in dataset.ann_file:
        return
    file = AnnotationFile(dataset.ann_file)
    for problem in file.problems(dataset.metainfo['classes'], _loads_masks(dataset)):
        yield f'{name}, {file.path}: {problem}.'
    yield from (f'{name}, {file.path}: {problem}.' for problem in _image_problems(file, dataset))


def _loads_masks(dataset) -> bool:
    return any(getattr(step, 'with_mask', False) for step in dataset.pipeline.transforms)


def _image_problems(file: AnnotationFile, dataset) -> Iterator[str]:
    missing = _missing_images(file, dataset)
    if missing:
        yield (f'{len(missing)} of {len(dataset)} images are not there, such as '
               f'{", ".join(missing[:EXAMPLES])}. Put them there, or correct data_root and '
               'data_prefix')
    else:
        yield from _size_problems(dataset)


def _missing_images(file: AnnotationFile, dataset) -> List[str]:
    """Paths of images of the data set that are not there."""
    folder = dataset.data_prefix.get('img') or ''
    if '://' in folder:
        return []
    if set(file.file_names) <= _names_below(folder, file.file_names):
        return []
    # Some of the file's images may be left out of the data set, or be named with escapes.
    paths = [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]
    return [path for path in paths if not os.path.exists(path)]


def _names_below(folder: str, wanted: Sequence[str]) -> set:
    """Names of files relative to the folder, by one listing of each folder that is named."""
    found = set()
    for subfolder in {os.path.dirname(name) for name in wanted}:
        path = os.path.join(folder, subfolder)
        if os.path.isdir(path):
            found.update(os.path.join(subfolder, name) for name in os.listdir(path))
    return found


def _size_problems(dataset) -> Iterator[str]:
    """Compares the sizes in the file with the pictures, as they are loaded, of a few images."""
    from mmcv.transforms import LoadImageFromFile

    load = next((step for step in dataset.pipeline.transforms
                 if isinstance(step, LoadImageFromFile)), None)
    if load is None or not len(dataset):
        return
    wrong: Dict[str, str] = {}
    chosen = range(0, len(dataset), max(len(dataset) // SIZES, 1))
    for index in chosen:
        info = dataset.get_data_info(index)
        loaded = load(dict(img_path=info['img_path']))['img'].shape[:2]
        expected = info['height'], info['width']
        if tuple(loaded) != expected:
            wrong[info['img_path']] = (f'{expected[0]} x {expected[1]} in the file and '
                                       f'{loaded[0]} x {loaded[1]} as loaded')
    if wrong:
        path, sizes = next(iter(wrong.items()))
        yield (f'{len(wrong)} of {len(chosen)} images looked at have another height x width than '
               f'the file says: {path} is {sizes}. Boxes and masks do not fit them. Pictures of '
               'cameras may be stored rotated (EXIF): write them upright, or correct the file')


def evaluator_problems(name: str, metric, dataset) -> Iterator[str]:
    """Whether a CocoMetric compares the data set's images with annotations of other images.

    Args:
        name: where the evaluator stands in the config.
        metric: built, of any kind.
        dataset: built, of any kind.
    """
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

    coco = getattr(metric, '_coco_api', None)
    if not isinstance(metric, CocoMetric) or coco is None or not isinstance(dataset, CocoDataset):
        return
    fields = ['area', 'iscrowd'] + ['segmentation'] * ('segm' in metric.metrics)
    for field in fields:
        lacking = [str(ann['id']) for ann in coco.anns.values() if field not in ann]
        if lacking:
            yield (f'{name}: {len(lacking)} of {len(coco.anns)} annotations have no {field!r}, '
                   f'such as id {", ".join(lacking[:EXAMPLES])}. Add it, or name another ann_file.')
    folder = dataset.data_prefix.get('img') or ''
    other = [info['img_path'] for info in map(dataset.get_data_info, range(len(dataset)))
             if _evaluated_as(coco, info['img_id'], folder) != Path(info['img_path'])]
    if other:
        yield (f'{name}: its ann_file has other images than {dataset.ann_file}, so detections are '
               f'compared with objects of other pictures: {len(other)} of {len(dataset)}, such as '
               f'{", ".join(other[:EXAMPLES])}. Give it ann_file={dataset.ann_file!r}.')


def _evaluated_as(coco, image_id, folder: str) -> Optional[Path]:
    image = coco.imgs.get(image_id)
    return Path(folder, image['file_name']) if image else None
