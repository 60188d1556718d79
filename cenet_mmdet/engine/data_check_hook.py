"""Looks at data and weights before a run starts: a hook for MMEngine's runner."""
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, Tuple

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..utils.errors import InputError
from .annotations import AnnotationFile, examples, missing_fields
from .weights import weight_problems


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Stops a run before its first iteration if its data or weights go wrong in silence.

        custom_hooks = [dict(type='DataCheckHook')]

    It looks at data sets in COCO's format, also inside wrappers, at the annotation file of
    MMDetection's CocoMetric, and at the checkpoints that `init_cfg` and `load_from` name;
    docs/limits.md has a list. An InputError has a line for each problem.
    """
    priority = 'VERY_HIGH'

    def before_run(self, runner: Any) -> None:
        _check(lambda: weight_problems(runner.model, runner.cfg))

    def before_train(self, runner: Any) -> None:
        _check(lambda: [*split_problems('train', runner.train_dataloader.dataset),
                        *_loop_problems('val', runner.val_loop)])

    def before_val(self, runner: Any) -> None:
        if runner.train_loop is None:
            _check(lambda: _loop_problems('val', runner.val_loop))

    def before_test(self, runner: Any) -> None:
        _check(lambda: _loop_problems('test', runner.test_loop))


def refuse(problems: Sequence[str]) -> None:
    """Raise an InputError with a line for each problem, if there are any."""
    if problems:
        raise InputError('\n'.join(f'- {problem}' for problem in problems))


def _check(find_problems: Callable[[], Iterable[str]]) -> None:
    """Refuse, on all ranks, the problems that the main process finds."""
    found = [list(dict.fromkeys(find_problems())) if is_main_process() else []]
    broadcast_object_list(found)
    refuse(found[0])


def _loop_problems(split: str, loop: Any) -> Iterator[str]:
    if loop is not None:
        yield from split_problems(split, loop.dataloader.dataset, loop.evaluator.metrics)


def split_problems(split: str, dataset: Any, metrics: Sequence = ()) -> Iterator[str]:
    """What is wrong with a built data set, or those in a wrapper, and with the metrics on it."""
    if find_spec('mmdet') is None:
        return  # only its data sets and metrics are looked at
    for leaf in leaves(dataset):
        yield from dataset_problems(f'{split}_dataloader', leaf)
        for metric in metrics:
            yield from evaluator_problems(f'{split}_evaluator', metric, leaf)


def leaves(dataset: Any) -> Iterator:
    """The data sets inside wrappers, or their configs inside configs of wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for wrapped in inner:
            yield from leaves(wrapped)


def dataset_problems(name: str, dataset: Any) -> Iterator[str]:
    """What is wrong with a built data set; those of other formats than COCO's are left alone."""
    from mmdet.datasets import CocoDataset

    if not isinstance(dataset, CocoDataset) or '://' in dataset.ann_file:
        return
    file = AnnotationFile(dataset.ann_file)
    with_masks = any(getattr(step, 'with_mask', False) for step in dataset.pipeline.transforms)
    problems = [*file.problems(dataset.metainfo['classes'], with_masks),
                _missing_images(file, dataset) or _wrong_sizes(dataset)]
    yield from (f'{name}, {file.path}: {problem}.' for problem in problems if problem)


def _missing_images(file: AnnotationFile, dataset: Any) -> Optional[str]:
    folder = dataset.data_prefix.get('img') or ''
    names = set() if '://' in folder else set(file.file_names)
    # One listing of a folder takes far less than a look at each of its files.
    for subfolder in {os.path.dirname(name) for name in names}:
        path = os.path.join(folder, subfolder)
        if os.path.isdir(path):
            names.difference_update(os.path.join(subfolder, name) for name in os.listdir(path))
    if not names:
        return None
    # Some of the file's images may be left out of the data set, or be named with escapes.
    paths = [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]
    missing = [path for path in paths if not os.path.exists(path)]
    return (f'{len(missing)} of {len(dataset)} images are not there, such as {examples(missing)}. '
            'Put them there, or correct data_root and data_prefix') if missing else None


def _wrong_sizes(dataset: Any) -> Optional[str]:
    """Compares the sizes in the file with the pictures, as they are loaded, of about 50 images."""
    from mmcv.transforms import LoadImageFromFile

    load = next((step for step in dataset.pipeline.transforms
                 if isinstance(step, LoadImageFromFile)), None)
    chosen = range(0, len(dataset) if load else 0, max(len(dataset) // 50, 1))
    wrong = []
    for info in map(dataset.get_data_info, chosen):
        height, width = load(dict(img_path=info['img_path']))['img'].shape[:2]
        if (height, width) != (info['height'], info['width']):
            wrong.append(f'{info["img_path"]} is {info["height"]} x {info["width"]} in the file '
                         f'and {height} x {width} as loaded')
    return (f'{len(wrong)} of {len(chosen)} images looked at have another height x width than '
            f'the file says: {wrong[0]}. Boxes and masks do not fit them. Pictures of cameras may '
            'be stored rotated (EXIF): write them upright, or correct the file') if wrong else None


def evaluator_problems(name: str, metric: Any, dataset: Any) -> Iterator[str]:
    """Whether a CocoMetric lacks fields, or compares the data set's images with those of others."""
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

    coco = getattr(metric, '_coco_api', None)
    if not isinstance(metric, CocoMetric) or coco is None or not isinstance(dataset, CocoDataset):
        return
    fields = ['area', 'iscrowd'] + ['segmentation'] * ('segm' in metric.metrics)
    for problem in missing_fields('annotations', list(coco.anns.values()), fields):
        yield f'{name}: {problem}.'
    infos = list(map(dataset.get_data_info, range(len(dataset))))
    folder = dataset.data_prefix.get('img') or ''
    names = {image_id: image['file_name'] for image_id, image in coco.imgs.items()}
    other = [info['img_path'] for info in infos
             if Path(folder, names.get(info['img_id'], '')) != Path(info['img_path'])]
    fix = f'Give it ann_file={dataset.ann_file!r}.'
    if other:
        yield (f'{name}: its ann_file has other images than {dataset.ann_file}, so detections are '
               f'compared with objects of other pictures: {len(other)} of {len(dataset)}, such as '
               f'{examples(other)}. {fix}')
        return
    # Two splits may name their pictures alike. Objects that somebody annotated anew are no error.
    annotated = [info for info in infos if info['instances']]
    other = [info['img_path'] for info in annotated
             if {tuple(instance['bbox']) for instance in info['instances']}.isdisjoint(
                 _corners(*annotation['bbox']) for annotation in coco.imgToAnns[info['img_id']])]
    if 2 * len(other) > len(annotated):
        yield (f'{name}: its ann_file has other objects than {dataset.ann_file}: in {len(other)} '
               f'of {len(annotated)} images no box is the same, such as {examples(other)}. {fix}')


def _corners(x: float, y: float, width: float, height: float) -> Tuple[float, ...]:
    return x, y, x + width, y + height  # as CocoDataset computes them
