#!/usr/bin/env python3
"""Train the detectors of docs/evidence.md and docs/adopt.md, on the demo's shapes.

    python tools/dev/make_demo_data.py data/demo
    python tools/dev/crop_objects.py data/demo data/demo_crops
    python tools/dev/evidence_shapes.py data/demo data/demo_crops

For each seed it trains two classifiers of single shapes, with batch norm and with CE, and from
their weights the detectors of Table 5 and those with CE put into a trained network. Each is one
process with one thread, SyncCE two. A run that was stopped goes on from its last epoch; a run that
is in RESULTS is not repeated. A finished one appends a line of JSON to RESULTS.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSIFIER = ROOT / 'configs' / 'demo' / 'ce_r18_shapes_classifier.py'
DETECTOR = ROOT / 'configs' / 'demo' / 'mask_rcnn_ce_r18_shapes_pretrained.py'
TRAIN = [sys.executable, ROOT / 'tools' / 'train.py']
SEEDS = (0, 1, 2)
CLASSIFIER_EPOCHS, DETECTOR_EPOCHS = 15, 4

# As the networks of tools/dev/evidence.py
SGD = [f'train_cfg.max_epochs={CLASSIFIER_EPOCHS}', f'param_scheduler.1.T_max={CLASSIFIER_EPOCHS}',
       'optim_wrapper.optimizer.type=SGD', 'optim_wrapper.optimizer.lr=0.1',
       'optim_wrapper.optimizer.momentum=0.9', 'optim_wrapper.optimizer.weight_decay=2e-3',
       f'default_hooks.checkpoint.interval={CLASSIFIER_EPOCHS}']
# Batch norms keep their running statistics, as MMDetection fine-tunes a ResNet.
FINE_TUNE = [f'train_cfg.max_epochs={DETECTOR_EPOCHS}',
             f'param_scheduler.1.T_max={DETECTOR_EPOCHS}',
             f'train_cfg.val_interval={DETECTOR_EPOCHS}', 'model.backbone.norm_eval=True',
             f'default_hooks.checkpoint.interval={DETECTOR_EPOCHS}']
PLAIN = ['model.backbone.type=ResNet']
IDENTITY = ['model.backbone.ce_cfg.identity_start=True']
FROZEN = ['model.backbone.ce_cfg.freeze=all', 'model.backbone.norm_cfg.type=BN',
          'model.backbone.norm_cfg.requires_grad=False']
SYNC = ['model.backbone.norm_eval=False', 'model.backbone.ce_cfg.type=SyncCE',
        'model.backbone.ce_cfg.freeze=adaptive', 'train_dataloader.batch_size=2']

CLASSIFIERS = {'bn': PLAIN, 'ce': []}
# name -> (classifier, options, processes)
DETECTORS = {
    'bn': ('bn', [*PLAIN, 'model.backbone.init_cfg.prefix=backbone.'], 1),
    'ce inserted': ('bn', [], 1),
    'ce inserted, identity_start': ('bn', IDENTITY, 1),
    'ce': ('ce', [], 1),
    'ce frozen': ('ce', FROZEN, 1),
    'syncce': ('ce', SYNC, 2),
}
# of the trained detector with batch norm, before any training
PUT_IN = {'bn': PLAIN, 'ce inserted': [], 'ce inserted, identity_start': IDENTITY}


def run_tool(command: List, log: Path, environment: Dict[str, str]) -> None:
    """Run a tool with one thread; its output goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        code = subprocess.run([str(part) for part in command], stdout=file, stderr=file,
                              env={**os.environ, 'OMP_NUM_THREADS': '1', **environment}).returncode
    if code:
        raise RuntimeError(f'{" ".join(map(str, command))} failed; see {log}')


def last_scalars(work_dir: Path, key: str) -> Dict[str, float]:
    """The last record with such a key that the run logged."""
    records = [json.loads(line) for path in sorted(work_dir.glob('*/**/*.json'))
               for line in path.read_text().splitlines()]
    return [record for record in records if key in record][-1]


class Experiments:
    """The runs of one seed after the other, and their lines of results."""

    def __init__(self, arguments) -> None:
        self.results = arguments.results
        self.work_dir = arguments.work_dir
        python = Path(sys.executable).parent  # torchrun lies beside it
        self.environment = dict(PATH=f'{python}{os.pathsep}{os.environ["PATH"]}',
                                COCO_ROOT=str(arguments.data.absolute()), COCO_YEAR='2017',
                                IMAGENET_ROOT=str(arguments.crops.absolute()))
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        self.finished = {json.loads(line)['name'] for line in lines}

    def run(self, name: str, seed: int, command: List, options: List[str], key: str,
            **environment: str) -> None:
        """Run a tool unless its line of results is there, and write this line."""
        line = f'shapes, {name}, seed {seed}'
        if line in self.finished:
            return
        folder = self.folder(name, seed)
        run_tool([*command, '--work-dir', folder, '--cfg-options', f'randomness.seed={seed}',
                  *options], folder / 'log.txt', {**self.environment, **environment})
        self.write(dict(name=line, experiment='shapes', model=name, seed=seed, options=options,
                        versions=versions(), scalars=last_scalars(folder, key)))

    def write(self, line: Dict) -> None:
        self.finished.add(line['name'])
        with open(self.results, 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        print(line['name'], line['scalars'], flush=True)

    def folder(self, name: str, seed: int) -> Path:
        return self.work_dir / f'{name.replace(", ", "_").replace(" ", "_")}_{seed}'

    def classifier(self, kind: str, seed: int) -> None:
        self.run(f'classifier {kind}', seed, [*TRAIN, CLASSIFIER, '--resume'],
                 [*SGD, *CLASSIFIERS[kind]], key='accuracy/top1')

    def detector(self, name: str, seed: int) -> None:
        kind, options, processes = DETECTORS[name]
        weights = self.folder(f'classifier {kind}', seed) / f'epoch_{CLASSIFIER_EPOCHS}.pth'
        command = ([*TRAIN, DETECTOR] if processes == 1 else
                   [ROOT / 'tools' / 'dist_train.sh', DETECTOR, processes])
        self.run(f'detector {name}', seed, [*command, '--resume'], [*FINE_TUNE, *options],
                 key='coco/bbox_mAP', CE_RESNET18_CHECKPOINT=str(weights.absolute()))

    def put_in(self, name: str, seed: int) -> None:
        """The trained detector with CE put in, evaluated before any training of CE."""
        weights = self.folder('detector bn', seed) / f'epoch_{DETECTOR_EPOCHS}.pth'
        self.run(f'put in {name}', seed,
                 [sys.executable, ROOT / 'tools' / 'test.py', DETECTOR, weights],
                 [*PUT_IN[name], 'model.backbone.init_cfg=None'], key='coco/bbox_mAP')


def versions() -> Dict[str, str]:
    import mmdet
    import torch

    return dict(python=platform.python_version(), torch=torch.__version__, mmdet=mmdet.__version__)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DATA', help='what make_demo_data.py wrote')
    parser.add_argument('crops', type=Path, metavar='CROPS', help='what crop_objects.py wrote')
    parser.add_argument('--results', type=Path, default=ROOT / 'docs/evidence/results.jsonl',
                        help='file to which finished runs are appended (docs/evidence/...)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/evidence_shapes'),
                        help='folder of the runs (%(default)s)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='runs at a time (%(default)s)')
    return parser.parse_args()


def main():
    arguments = parse_args()
    experiments = Experiments(arguments)
    stages = [(experiments.classifier, CLASSIFIERS), (experiments.detector, DETECTORS),
              (experiments.put_in, PUT_IN)]
    for seed in SEEDS:
        for step, names in stages:
            with ThreadPoolExecutor(arguments.workers) as pool:
                list(pool.map(lambda name, step=step, seed=seed: step(name, seed), names))


if __name__ == '__main__':
    main()
