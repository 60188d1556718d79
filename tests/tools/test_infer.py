"""tools/infer.py on folders of images, and MMDetection's own ways to use a trained model."""
import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_here, tool
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools import mask as coco_masks

from cenet_mmdet import CE

DEMO_CONFIG = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes.py'
# Not the config's names: the checkpoint's count.
CLASSES = ('round', 'square', 'triangle', 'star', 'cross')
PER_IMAGE = 10


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The demo's, of which untrained weights pass enough detections."""
    path = tmp_path_factory.mktemp('config') / 'config.py'
    path.write_text(f'_base_ = {str(DEMO_CONFIG)!r}\n'
                    f'model = dict(test_cfg=dict(rcnn=dict(score_thr=0.001, '
                    f'max_per_img={PER_IMAGE})))\n')
    return path


@pytest.fixture(scope='module')
def checkpoint(config, tmp_path_factory):
    """Random weights, with CE layers that know that their statistics are set."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    for module in model.modules():
        if isinstance(module, CE):
            module.num_batches_tracked.fill_(1)
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    torch.save(dict(state_dict=model.state_dict(),
                    meta=dict(dataset_meta=dict(classes=CLASSES))), path)
    return path


@pytest.fixture(scope='module')
def photos(shapes, tmp_path_factory):
    """Images in two subfolders, one name in both; one file is broken and one no image."""
    folder = tmp_path_factory.mktemp('images') / 'photos'
    first, second, *_ = sorted((shapes / 'val2017').iterdir())
    for subfolder in ('a', 'b/c'):
        (folder / subfolder).mkdir(parents=True)
    cv2.imwrite(str(folder / 'a/same.png'), cv2.imread(str(first)))
    cv2.imwrite(str(folder / 'b/c/same.png'), cv2.imread(str(second))[:200])
    shutil.copy(second, folder / 'upper.JPG')
    (folder / 'a/broken.jpg').write_bytes(first.read_bytes()[:100])
    (folder / 'a/notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def command(config, checkpoint):
    """Arguments of the tool for this model, or another one."""
    return lambda *arguments, config=config, checkpoint=checkpoint: (
        'infer.py', '--config', config, '--checkpoint', checkpoint, '--device', 'cpu', *arguments)


@pytest.fixture(scope='module')
def done(command, photos, tmp_path_factory):
    """The result for the photos, and the folder that it was started in."""
    folder = tmp_path_factory.mktemp('done')
    with pytest.MonkeyPatch.context() as patch:
        result = run_here(patch, *command(photos, '--score', 0, '--batch-size', 2), cwd=folder)
    return result, folder


@pytest.fixture
def infer(command, tool_here, tmp_path_factory):
    folder = tmp_path_factory.mktemp('cwd')
    return lambda *arguments, **options: (
        tool_here(*command(*arguments, **options), cwd=folder), folder)


def results(folder):
    return json.loads((folder / 'results.json').read_text())


READABLE = {1: 'a/same.png', 2: 'b/c/same.png', 3: 'upper.JPG'}


def test_a_broken_image_is_named_and_the_others_are_done(done):
    result, folder = done
    assert result.returncode == 1
    assert result.stderr == '1 of 4 images could not be read: a/broken.jpg\n'
    assert '30 detections in 3 images: inference/results.json' in result.stdout
    written = {path.relative_to(folder).as_posix() for path in folder.rglob('*.*')}
    assert written == {'inference/results.json',
                       *(f'inference/vis/{name}' for name in READABLE.values())}


def test_results_are_cocos(done, photos):
    found = results(done[1] / 'inference')
    assert [entry['image_id'] for entry in found] == sorted(list(READABLE) * PER_IMAGE)
    for entry in found:
        assert READABLE[entry['image_id']] == entry['file_name']
        assert CLASSES[entry['category_id'] - 1] == entry['category']
        assert 0 < entry['score'] <= 1
        height, width = cv2.imread(str(photos / entry['file_name'])).shape[:2]
        x, y, box_width, box_height = entry['bbox']
        assert 0 <= x < x + box_width <= width + 1e-3
        assert 0 <= y < y + box_height <= height + 1e-3
        mask = coco_masks.decode(entry['segmentation'])
        assert mask.shape == (height, width)
        rows, columns = mask.nonzero()
        if len(rows):
            assert x - 1 <= columns.min() <= columns.max() <= x + box_width
            assert y - 1 <= rows.min() <= rows.max() <= y + box_height


def test_pictures_show_detections(done, photos):
    """In their own places: the lossless picture is the image where nothing was drawn."""
    for name in ('a/same.png', 'b/c/same.png'):
        image = cv2.imread(str(photos / name)).astype(int)
        picture = cv2.imread(str(done[1] / 'inference/vis' / name)).astype(int)
        changed = np.abs(image - picture).max(-1) > 10
        assert 0.001 < changed.mean() < 0.9


def test_fused_model_finds_the_same_above_score_none_is_drawn(done, infer, photos):
    result, folder = infer(photos, '--fuse', '--score', 0.999, '--out', 'deep/fused')
    assert result.returncode == 1
    expected, found = results(done[1] / 'inference'), results(folder / 'deep/fused')
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        for key in ('image_id', 'file_name', 'category_id', 'category'):
            assert ours[key] == theirs[key]
        assert ours['score'] == pytest.approx(theirs['score'], abs=1e-3)
        assert ours['bbox'] == pytest.approx(theirs['bbox'], abs=0.1)
    picture = cv2.imread(str(folder / 'deep/fused/vis/a/same.png'))
    np.testing.assert_array_equal(picture, cv2.imread(str(photos / 'a/same.png')))


def test_several_paths_and_a_bare_state_dict(infer, checkpoint, photos, tmp_path):
    """Names are relative to the common folder; classes are the config's."""
    bare = tmp_path / 'bare.pth'
    torch.save(torch.load(checkpoint, weights_only=False)['state_dict'], bare)
    result, folder = infer(photos / 'b', photos / 'a/same.png', photos / 'b/c/same.png',
                                checkpoint=bare)
    assert result.returncode == 0
    found = results(folder / 'inference')
    assert {(entry['image_id'], entry['file_name']) for entry in found} == {
        (0, 'b/c/same.png'), (1, 'a/same.png')}
    names = Config.fromfile(DEMO_CONFIG).metainfo.classes
    assert {names[entry['category_id'] - 1] for entry in found} == {
        entry['category'] for entry in found}


class TestBadInputs:
    """One line, another exit status than 0, and nothing is written."""

    @pytest.fixture
    def refusal(self, infer):
        def run_it(*arguments, **options):
            result, folder = infer(*arguments, **options)
            assert (result.returncode, result.stderr.count('\n')) == (1, 1)
            assert not list(folder.iterdir())
            return result.stderr

        return run_it

    def test_the_line_is_all_that_stderr_has(self, command, photos, tmp_path):
        """Of a process of its own."""
        result = tool(*command(photos / 'a/broken.jpg'), cwd=tmp_path, check=False)
        assert result.returncode == 1
        assert result.stderr == '1 of 1 images could not be read: broken.jpg\n'
        assert not list(tmp_path.iterdir())

    def test_images(self, refusal, tmp_path, photos):
        assert f'no images in {tmp_path}:' in refusal(tmp_path)
        assert 'no images in' in refusal(photos / 'a/notes.txt')
        assert refusal('nowhere') == 'no such image or folder: nowhere\n'
        assert 'is no folder' in refusal(photos, '--out', photos / 'a/notes.txt')

    def test_options(self, refusal, photos):
        assert 'config not found: nothing.py' in refusal(photos, config='nothing.py')
        assert 'checkpoint not found: /nowhere/a.pth' in refusal(
            photos, checkpoint='/nowhere/a.pth')
        assert 'not the config of a detector' in refusal(
            photos, config=ROOT / 'configs/demo/ce_r18_shapes_classifier.py')
        assert 'device cuda:99 cannot be used' in refusal(photos, '--device', 'cuda:99')

    def test_another_models_checkpoint(self, refusal, photos, checkpoint, tmp_path):
        """MMDetection would go on with random weights."""
        content = torch.load(checkpoint, weights_only=False)
        del content['state_dict']['roi_head.bbox_head.fc_cls.weight']
        torch.save(content, tmp_path / 'other.pth')
        message = refusal(photos, checkpoint=tmp_path / 'other.pth')
        assert 'does not fit' in message and 'roi_head.bbox_head.fc_cls.weight' in message

    def test_unset_statistics_cannot_be_folded(self, refusal, photos, checkpoint, tmp_path):
        content = torch.load(checkpoint, weights_only=False)
        content['state_dict']['backbone.ce1.num_batches_tracked'].zero_()
        torch.save(content, tmp_path / 'unset.pth')
        message = refusal(photos, '--fuse', checkpoint=tmp_path / 'unset.pth')
        assert 'backbone.ce1 (its statistics were never trained' in message


def test_pictures_of_an_earlier_run_are_no_images(infer, photos, tmp_path):
    """Where OUT lies inside the folder given; OUT/vis itself is never written over."""
    shutil.copytree(photos / 'b', tmp_path / 'photos')
    (tmp_path / 'photos/out/vis').mkdir(parents=True)
    shutil.copy(photos / 'upper.JPG', tmp_path / 'photos/out/vis/old.jpg')
    result, _ = infer(tmp_path / 'photos', '--out', tmp_path / 'photos/out')
    assert result.returncode == 0
    assert {entry['file_name'] for entry in results(tmp_path / 'photos/out')} == {'c/same.png'}
    result, _ = infer(tmp_path / 'photos/out/vis', '--out', tmp_path / 'photos/out')
    assert 'would be overwritten' in result.stderr


def test_mmdetections_own_interfaces(done, config, checkpoint, photos):
    """DetInferencer and init_detector take config and checkpoint as they are, and find the same."""
    expected = [entry for entry in results(done[1] / 'inference')
                if entry['file_name'] == 'a/same.png']
    path = str(photos / 'a/same.png')
    inferencer = DetInferencer(str(config), str(checkpoint), device='cpu', show_progress=False)
    prediction, = inferencer(path)['predictions']
    detector = init_detector(str(config), str(checkpoint), device='cpu')
    sample = inference_detector(detector, path).pred_instances
    assert detector.dataset_meta['classes'] == CLASSES
    for scores, labels in ((prediction['scores'], prediction['labels']),
                           (sample.scores.tolist(), sample.labels.tolist())):
        assert scores == pytest.approx([entry['score'] for entry in expected], abs=1e-4)
        assert [label + 1 for label in labels] == [entry['category_id'] for entry in expected]
    assert len(sample.masks) == PER_IMAGE


def test_help_answers_at_once_with_an_example(tmp_path):
    """Without importing torch, which takes seconds."""
    result = run(sys.executable, '-X', 'importtime', ROOT / 'tools/infer.py', '--help',
                 cwd=tmp_path)
    assert 'python tools/infer.py photos/ --config' in result.stdout
    assert 'argparse' in result.stderr
    assert 'torch' not in result.stderr
    assert not list(tmp_path.iterdir())
