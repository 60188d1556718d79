"""DataCheckHook and what it is made of: data and weights that would go wrong in silence."""
import copy
import json
import os
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from cenet_mmdet import CEResNet
from cenet_mmdet.checkpoint.convert import to_released
from cenet_mmdet.checkpoint.resumable import last_checkpoint
from cenet_mmdet.engine.annotations import AnnotationFile
from cenet_mmdet.engine.data_check_hook import dataset_problems, evaluator_problems, leaves
from cenet_mmdet.engine.weights import weight_problems
from cenet_mmdet.models.build import build_model, load_model
from cenet_mmdet.utils.errors import InputError

CONFIG = ROOT / 'configs/demo/mask_rcnn_ce_r18_shapes.py'
CLASSES = ('disk', 'square', 'triangle', 'star', 'cross')
PIPELINE = [dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]


@pytest.fixture
def coco(shapes, tmp_path):
    """A copy of the generated set, to be spoilt."""
    return Path(shutil.copytree(shapes, tmp_path / 'coco'))


def edit(coco, change, split='train2017'):
    path = coco / f'annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def dataset(coco, classes=CLASSES, split='train2017', **options):
    init_default_scope('mmdet')
    return CocoDataset(data_root=str(coco), ann_file=f'annotations/instances_{split}.json',
                       data_prefix=dict(img=f'{split}/'), metainfo=dict(classes=classes),
                       pipeline=copy.deepcopy(PIPELINE), **options)


def problems(coco, *args, **options):
    return list(dataset_problems('train_dataloader', dataset(coco, *args, **options)))


def drop(kind, field, every=1):
    """Remove a field from each `every`-th entry."""
    def change(content):
        for entry in content[kind][::every]:
            entry.pop(field)
    return change


class TestDataSets:

    def test_nothing_is_wrong_with_a_good_one(self, coco):
        assert problems(coco) == []
        assert problems(coco, ('disk', 'cross')) == []  # some of the classes, in the file's order

    @pytest.mark.parametrize(('classes', 'expected'), [
        (('square', 'disk', 'triangle', 'star', 'cross'),
         "label 0 is 'disk' in the file and 'square' in classes. Write classes=('disk', 'square',"),
        (('star', 'disk'), "label 0 is 'disk' in the file and 'star' in classes"),
        (('disc', 'square'), "1 of 2 classes are not in the file: disc (did you mean 'disk'?)"),
        (('person', 'car', 'dog', 'cat'), '4 of 4 classes are not in the file: person, car, dog')])
    def test_classes_that_are_not_the_files(self, coco, classes, expected):
        problem, = problems(coco, classes)
        assert expected in problem
        assert f'{coco}/annotations/instances_train2017.json' in problem

    def test_a_text_for_classes(self, coco):
        file = AnnotationFile(coco / 'annotations/instances_train2017.json')
        problem, = file.problems('disk', with_masks=True)
        assert "classes=('disk', )" in problem

    def test_labels_really_are_the_files(self, coco):
        """What the check is for: MMDetection calls a disk a square, and says nothing."""
        edit(coco, lambda content: content['categories'].reverse())
        data = dataset(coco)
        assert data.cat2label[1] == 4  # the disk's id
        assert 'numbered in the order of the file' in next(dataset_problems('', data))

    @pytest.mark.parametrize('field', ['iscrowd', 'segmentation'])
    def test_missing_fields_of_annotations(self, coco, field):
        edit(coco, drop('annotations', field, every=2))
        problem, = problems(coco)
        assert f'annotations have no {field!r}, such as id 1, 3, 5 ...' in problem

    def test_masks_that_are_not_loaded_may_be_missing(self, coco):
        edit(coco, drop('annotations', 'segmentation'))
        data = dataset(coco)
        data.pipeline.transforms[1].with_mask = False
        assert not list(dataset_problems('', data))

    def test_missing_images(self, coco):
        (coco / 'train2017/000000000002.jpg').unlink()
        (coco / 'train2017/000000000005.jpg').unlink()
        problem, = problems(coco)
        assert '2 of 10 images are not there, such as' in problem
        assert 'train2017/000000000002.jpg' in problem

    def test_images_left_out_of_the_data_set_may_be_missing(self, coco):
        (coco / 'train2017/000000000009.jpg').unlink()
        assert problems(coco, indices=4) == []

    def test_names_with_escapes_and_folders(self, coco):
        def rename(content):
            content['images'][0]['file_name'] = 'größe/1.jpg'
        edit(coco, rename)
        (coco / 'train2017/größe').mkdir()
        (coco / 'train2017/000000000001.jpg').rename(coco / 'train2017/größe/1.jpg')
        assert problems(coco) == []

    def test_rotated_pictures(self, coco):
        """As a camera writes them: the size in the file is that of the picture as it is stored."""
        path = coco / 'train2017/000000000001.jpg'
        picture = cv2.resize(cv2.imread(str(path)), (320, 200))
        encoded = cv2.imencode('.jpg', picture)[1].tobytes()
        exif = (b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')
        segment = b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif
        path.write_bytes(encoded[:2] + segment + encoded[2:])
        edit(coco, lambda content: content['images'][0].update(height=200, width=320))
        problem, = problems(coco)
        assert '1 of 10 images looked at have another height x width' in problem
        assert 'is 200 x 320 in the file and 320 x 200 as loaded' in problem
        assert 'EXIF' in problem

    def test_wrapped_data_sets(self, coco):
        inner = dict(type='CocoDataset', data_root=str(coco), metainfo=dict(classes=CLASSES[::-1]),
                     ann_file='annotations/instances_train2017.json',
                     data_prefix=dict(img='train2017/'), pipeline=PIPELINE)
        init_default_scope('mmdet')
        for cfg in (dict(type='RepeatDataset', times=2, dataset=inner),
                    dict(type='ConcatDataset', datasets=[inner, inner]),
                    dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=inner),
                    dict(type='MultiImageMixDataset', dataset=inner, pipeline=[])):
            found = [problem for leaf in leaves(DATASETS.build(copy.deepcopy(cfg)))
                     for problem in dataset_problems('', leaf)]
            assert len(found) == len(cfg.get('datasets', [0]))

    def test_other_formats_are_left_alone(self):
        assert list(dataset_problems('', torch.utils.data.TensorDataset(torch.zeros(2)))) == []


class TestEvaluators:

    @staticmethod
    def found(coco, ann_file, **options):
        metric = CocoMetric(ann_file=str(coco / 'annotations' / ann_file), metric=['bbox', 'segm'])
        return list(evaluator_problems('val_evaluator', metric, dataset(coco, split='val2017')))

    def test_the_data_sets_own_file(self, coco):
        assert self.found(coco, 'instances_val2017.json') == []

    def test_another_file_with_the_same_ids(self, coco):
        edit(coco, lambda content: [image.update(file_name=f'other_{image["file_name"]}')
                                    for image in content['images']])
        problem, = self.found(coco, 'instances_train2017.json')
        assert '6 of 6' in problem
        assert f"Give it ann_file='{coco}/annotations/instances_val2017.json'" in problem

    def test_another_split_that_names_its_images_alike(self, coco):
        """As the generated set's do: only the objects differ."""
        problem, = self.found(coco, 'instances_train2017.json')
        assert 'has other objects than' in problem and 'no box is the same' in problem
        assert f"Give it ann_file='{coco}/annotations/instances_val2017.json'" in problem

    def test_some_objects_annotated_anew(self, coco):
        """A cleaned file for the evaluation is what somebody wants."""
        shutil.copy(coco / 'annotations/instances_val2017.json',
                    coco / 'annotations/instances_clean.json')
        edit(coco, lambda content: [annotation['bbox'].__setitem__(0, 1.5)
                                    for annotation in content['annotations'][::2]], split='clean')
        assert self.found(coco, 'instances_clean.json') == []

    def test_missing_fields_are_told_now(self, coco):
        edit(coco, drop('annotations', 'segmentation'), split='val2017')
        problem, = self.found(coco, 'instances_val2017.json')
        assert "annotations have no 'segmentation'" in problem


class TestWeights:

    @staticmethod
    def found(path, **options):
        init_cfg = dict(type='Pretrained', checkpoint=str(path), **options)
        model = nn.ModuleDict(dict(backbone=CEResNet(18, base_channels=8, stem_channels=8,
                                                     init_cfg=init_cfg)))
        return weight_problems(model, Config())

    @pytest.fixture
    def state(self):
        return CEResNet(18, base_channels=8, stem_channels=8).state_dict()

    def test_all_kinds_that_arrive(self, state, tmp_path):
        plain = {key: value for key, value in state.items() if 'ce' not in key}
        for entries in (state, to_released(state), plain, dict(state_dict=state),
                        {f'backbone.{key}': value for key, value in state.items()},
                        {f'module.{key}': value for key, value in state.items()}):
            torch.save(entries, tmp_path / 'weights.pth')
            assert self.found(tmp_path / 'weights.pth') == []

    @pytest.mark.parametrize('prefix', ['model.', '_orig_mod.', 'encoder_q.'])
    def test_a_prefix_in_the_way(self, state, tmp_path, prefix):
        path = tmp_path / 'weights.pth'
        torch.save({f'{prefix}{key}': value for key, value in state.items()}, path)
        problem, = self.found(path)
        assert f'{len(state)} entries of the network, 0 arrive' in problem
        assert f'prefix={prefix!r}' in problem
        assert 'conv1.weight' in problem
        assert self.found(path, prefix=prefix) == []

    def test_weights_under_a_key(self, state, tmp_path):
        torch.save(dict(model=state, epoch=3), tmp_path / 'weights.pth')
        problem, = self.found(tmp_path / 'weights.pth')
        assert "torch.save(torch.load(FILE)['model'], 'weights.pth')" in problem

    def test_another_network(self, tmp_path):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'weights.pth')
        problem, = self.found(tmp_path / 'weights.pth')
        assert '0 arrive' in problem
        assert 'weight, bias' in problem

    def test_files_that_cannot_be_read(self, tmp_path):
        (tmp_path / 'cut.pth').write_bytes(b'PK\x03\x04 cut')
        assert 'checkpoint not found: /nowhere.pth' in self.found('/nowhere.pth')[0]
        assert 'cut.pth is damaged' in self.found(tmp_path / 'cut.pth')[0]
        with pytest.raises(InputError, match=r'cut\.pth is damaged'):
            load_model(CONFIG, tmp_path / 'cut.pth')

    def test_schemes_are_mmengines(self):
        assert self.found('s3://bucket/weights.pth') == []
        if pytest.importorskip('importlib.util').find_spec('torchvision') is None:
            assert 'needs torchvision' in self.found('torchvision://resnet18')[0]


def test_a_moved_work_directory_goes_on_from_its_newest_checkpoint(tmp_path):
    for epoch in (1, 2):
        (tmp_path / f'epoch_{epoch}.pth').touch()
        os.utime(tmp_path / f'epoch_{epoch}.pth', (epoch, epoch))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text('/old/place/epoch_1.pth')
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text('/old/place/epoch_7.pth')
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    assert last_checkpoint(tmp_path / 'nothing') is None


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_a_run_is_stopped_before_it_starts(coco, tool_here, tmp_path, name):
    """All that is wrong in one message, exit status 1, nothing trained."""
    edit(coco, lambda content: content['categories'].reverse(), split='val2017')
    (coco / 'train2017/000000000003.jpg').unlink()
    checkpoint = []
    if name == 'test.py':
        checkpoint = [tmp_path / 'weights.pth']
        torch.save(build_model(CONFIG).state_dict(), checkpoint[0])
    result = tool_here(name, CONFIG, *checkpoint, '--cfg-options', *SMALL[3:], cwd=tmp_path,
                       env=dict(COCO_ROOT=str(coco)))
    assert result.returncode == 1
    errors = result.stderr.splitlines()[-2:]
    assert ('1 of 10 images are not there' in errors[0]) is (name == 'train.py')
    assert 'numbered in the order of the file' in errors[-1]
    assert 'Epoch(' not in result.stdout
    assert not list(tmp_path.rglob('epoch_*'))


def test_hooks_need_mmengine_alone(tmp_path):
    """Without MMDetection, the package has its layers and hooks, which then check weights only."""
    code = ('import sys; sys.modules["mmdet"] = None; import cenet_mmdet\n'
            'from cenet_mmdet.engine.data_check_hook import split_problems\n'
            'print(cenet_mmdet.__all__, list(split_problems("train", [0])))')
    out = run(sys.executable, '-W', 'ignore', '-c', code, cwd=tmp_path).stdout
    assert "'DataCheckHook'" in out and "'CEBN'" in out and 'CEResNet' not in out
    assert out.endswith(' []\n')


@pytest.mark.long
def test_the_time_on_a_file_of_cocos_size(tmp_path):
    """118,000 images, 860,000 objects: under 2 s beyond the decoding of 50 pictures."""
    random = np.random.default_rng(0)
    (tmp_path / 'images').mkdir()
    images = [dict(id=i, file_name=f'{i:012d}.jpg', height=4, width=4) for i in range(118_000)]
    for image in images:
        (tmp_path / 'images' / image['file_name']).touch()
    polygon = [round(float(value), 2) for value in random.uniform(0, 4, 60)]
    annotations = [dict(id=i, image_id=i % len(images), category_id=1, area=9., iscrowd=0,
                        bbox=[0, 0, 3, 3], segmentation=[polygon]) for i in range(860_000)]
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                    categories=[dict(id=1, name='thing')])))
    init_default_scope('mmdet')
    data = CocoDataset(ann_file=str(path), data_prefix=dict(img=str(tmp_path / 'images')),
                       metainfo=dict(classes=('thing', )), pipeline=[])
    start = time.perf_counter()
    assert list(dataset_problems('train_dataloader', data)) == []
    seconds = time.perf_counter() - start
    print(f'{path.stat().st_size / 1e6:.0f} MB: {seconds:.2f} s')
    assert seconds < 2
