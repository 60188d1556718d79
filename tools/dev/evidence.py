#!/usr/bin/env python3
"""Train the networks behind docs/evidence.md: slim VGGs on CIFAR-10, with CE and without.

    python tools/dev/evidence.py data/cifar10
    python tools/dev/evidence.py data/cifar10 --only 'bn_.*wd2e-3_s0' --workers 1

DATA holds cifar-10-batches-py/. Each run is one process with one thread. A run that was stopped
goes on from its last epoch; a run that is in RESULTS is not repeated. A finished run appends one
line of JSON to RESULTS and leaves its weights in WORK_DIR. tools/dev/evidence_page.py makes the
tables and pictures.
"""
import argparse
import json
import os
import pickle
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from cenet_mmdet import IterNorm, __version__, insert_ce  # noqa: E402
from cenet_mmdet.analysis import (  # noqa: E402
    ChannelCorrelations,
    ChannelMagnitudes,
    ablation_curve,
    feature_magnitude,
)
from cenet_mmdet.datasets.label_noise import corrupt_labels  # noqa: E402

BATCH = 128
LEARNING_RATE, MOMENTUM = 0.1, 0.9
# 'M' halves height and width
WIDTHS = (16, 'M', 32, 'M', 64, 64, 'M', 128, 128, 'M', 256, 256, 'M')
# Mean and standard deviation of CIFAR-10's red, green and blue
MEAN, STD = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)
WEIGHT_DECAYS = (2e-3, 5e-4, 1e-3, 4e-3)
MOST_INHIBITED = 2e-3
CORRELATED_IMAGES, ABLATED_IMAGES = 256, 2000
ABLATED = [i / 10 for i in range(10)]  # shares of the channels
NORMS = {'bn': nn.BatchNorm2d, 'ln': partial(nn.GroupNorm, 1), 'iternorm': IterNorm}
ACTIVATIONS = {'relu': nn.ReLU, 'elu': nn.ELU, 'leakyrelu': nn.LeakyReLU}
BRANCHES = {'ce': {}, 'bd': dict(bd_ratio=1.0), 'ir': dict(bd_ratio=0.0)}


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes:
        norm: 'bn', 'ln' (one group, all pixels) or 'iternorm'.
        ce: what follows each norm: 'ce', 'bd' (lambda = 1), 'ir' (lambda = 0) or None.
        act: 'relu', 'elu' or 'leakyrelu'.
        weight_decay: on every parameter.
        corrupted: share of the training labels that are drawn anew.
        seed: of the initial weights, the order of images, flips and corrupted labels.
    """
    norm: str = 'bn'
    ce: Optional[str] = None
    act: str = 'relu'
    weight_decay: float = MOST_INHIBITED
    corrupted: float = 0.
    seed: int = 0
    epochs: int = 15

    @property
    def name(self) -> str:
        decay = f'wd{self.weight_decay:.0e}'.replace('e-0', 'e-')
        parts = [self.norm, self.ce, self.act * (self.act != 'relu'), decay,
                 f'noise{self.corrupted:g}' * (self.corrupted > 0), f's{self.seed}']
        return '_'.join(filter(None, parts))


def all_runs() -> List[Run]:
    """In the order of training: one seed of everything first."""
    def decays(seed, layers):
        return [Run(ce=ce, weight_decay=decay, seed=seed)
                for decay in WEIGHT_DECAYS for ce in layers]

    pairs = [Run(norm=norm, act=act, ce=ce)
             for norm, act in (('ln', 'relu'), ('bn', 'elu'), ('bn', 'leakyrelu'))
             for ce in (None, 'ce')]
    noise = [Run(ce=ce, corrupted=share) for share in (0.4, 0.2, 0.6) for ce in (None, 'ce')]
    at_most_inhibited = [Run(ce=ce) for ce in (None, 'ce', 'bd', 'ir')]
    return list(dict.fromkeys([
        *at_most_inhibited, *decays(0, (None, 'ce')), *noise[:2], *pairs, Run(norm='iternorm'),
        *noise[2:], *decays(0, ('bd', 'ir')), *decays(1, (None, 'ce', 'bd', 'ir'))]))


def build_network(run: Run) -> nn.Module:
    """VGG with a norm behind each convolution, which has no bias, and CE behind the norm."""
    layers, channels = [], 3
    for width in WIDTHS:
        if width == 'M':
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False),
                       NORMS[run.norm](width), ACTIVATIONS[run.act]()]
            channels = width
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))
    return insert_ce(network, '.*', BRANCHES[run.ce]) if run.ce else network


def load_split(folder: Path, names):
    """Images (N, 3, 32, 32), normalized, and labels (N, )."""
    batches = [pickle.loads((folder / name).read_bytes(), encoding='latin1') for name in names]
    images = np.concatenate([batch['data'] for batch in batches]).reshape(-1, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    labels = np.concatenate([batch['labels'] for batch in batches])
    return (torch.from_numpy(images).float() - mean) / std, torch.from_numpy(labels)


def train_epoch(network, optimizer, scheduler, images, labels, seed: int) -> Dict[str, float]:
    """Mean loss and accuracy over the epoch, while the network learns."""
    generator = torch.Generator().manual_seed(seed)
    network.train()
    total = correct = seen = 0
    for batch in torch.randperm(len(images), generator=generator).split(BATCH):
        if len(batch) < BATCH:
            break
        flipped = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flipped, images[batch].flip(-1), images[batch])
        logits = network(x)
        loss = cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item() * len(batch)
        correct += (logits.argmax(1) == labels[batch]).sum().item()
        seen += len(batch)
    return dict(loss=round(total / seen, 5), train_accuracy=round(100 * correct / seen, 3))


@torch.no_grad()
def evaluate(network, images, labels) -> Dict:
    """Test accuracy; by layer, inhibited channels, their magnitude, and correlations."""
    network.eval()
    with ChannelMagnitudes(network) as magnitudes:
        correct = sum((network(x).argmax(1) == y).sum().item()
                      for x, y in zip(images.split(500), labels.split(500)))
    with ChannelCorrelations(network) as correlations:
        network(images[:CORRELATED_IMAGES])
    inhibited = magnitudes.result()
    return dict(
        accuracy=100 * correct / len(images),
        inhibited=round(100 * inhibited.share, 3),
        inhibited_by_layer=[round(100 * share, 3) for share in inhibited.shares.values()],
        magnitude_by_layer=[round(m.mean().item(), 5) for m in inhibited.magnitudes.values()],
        correlation_by_layer=[round(points['output'].mean, 4)
                              for points in correlations.result().values()])


@torch.no_grad()
def measure(network, images, labels) -> Dict:
    """Of the trained network: accuracy without some channels, and the first layer's magnitude.

    `ablation` has the accuracy in percent by (draw of channels, share), with the channels of
    the first norm zeroed, or those of all norms. `magnitude` is the l2 norm over the first
    layer's channels, in means over the images and over 4 x 4 positions: (8, 8).
    """
    def accuracy(network):
        hits = [(network(x).argmax(1) == y).float() for x, y in zip(images.split(500),
                                                                    labels.split(500))]
        return 100 * torch.cat(hits).mean().item()

    images, labels = images[:ABLATED_IMAGES], labels[:ABLATED_IMAGES]
    curves = {name: ablation_curve(network, accuracy, layers, ABLATED, seeds=range(3))
              for name, layers in (('first', '1'), ('all', '.*'))}
    magnitude = feature_magnitude(network, images[:CORRELATED_IMAGES], '1').mean(0)
    return dict(ablation={name: curve.round(decimals=2).tolist() for name, curve in curves.items()},
                magnitude=[[round(value, 4) for value in row] for row in
                           avg_pool2d(magnitude[None], 4)[0].tolist()])


def train(run: Run, data: Path, work_dir: Path, messages) -> Dict:
    """Train from the last finished epoch on, and return the run's line of results."""
    torch.set_num_threads(1)
    folder = data / 'cifar-10-batches-py'
    images, labels = load_split(folder, [f'data_batch_{i}' for i in range(1, 6)])
    labels = torch.from_numpy(corrupt_labels(labels, run.corrupted, run.seed, num_classes=10))
    test_images, test_labels = load_split(folder, ['test_batch'])

    torch.manual_seed(run.seed)
    network = build_network(run)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=MOMENTUM,
                                weight_decay=run.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, run.epochs * (len(images) // BATCH))
    states = dict(network=network, optimizer=optimizer, scheduler=scheduler)
    path, history = work_dir / f'{run.name}.pth', []
    if path.is_file():
        checkpoint = torch.load(path, weights_only=True)
        history = checkpoint['history']
        for name, state in states.items():
            state.load_state_dict(checkpoint[name])
    for epoch in range(len(history), run.epochs):
        start = time.process_time()
        numbers = train_epoch(network, optimizer, scheduler, images, labels,
                              seed=1000 * run.seed + epoch)
        numbers['cpu_seconds'] = round(time.process_time() - start, 1)
        history.append({**numbers, **evaluate(network, test_images, test_labels)})
        checkpoint = {name: state.state_dict() for name, state in states.items()}
        torch.save(dict(checkpoint, history=history), path.with_suffix('.part'))
        os.replace(path.with_suffix('.part'), path)
        messages.put((run.name, epoch + 1, history[-1]))
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    cenet_mmdet=__version__)
    return dict(name=run.name, config=asdict(run), versions=versions, epochs=history,
                **measure(network, test_images, test_labels))


def run_list(runs: List[Run], arguments) -> Iterator[Dict]:
    """Lines of results as they come, with the progress over all epochs on the way."""
    context = get_context('spawn')
    messages = context.Manager().Queue()
    total, done, start = sum(run.epochs for run in runs), 0, time.time()
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        waiting = {pool.submit(train, run, arguments.data, arguments.work_dir, messages)
                   for run in runs}
        while waiting:
            time.sleep(1)
            while not messages.empty():
                name, epoch, numbers = messages.get()
                done += 1
                hours = (time.time() - start) / done * (total - done) / 3600
                print(f'{name} epoch {epoch}: loss {numbers["loss"]:.3f}, accuracy '
                      f'{numbers["accuracy"]:.1f} %, inhibited {numbers["inhibited"]:.1f} %; '
                      f'{done} of {total} epochs, about {hours:.1f} h left', flush=True)
            for future in [future for future in waiting if future.done()]:
                waiting.remove(future)
                yield future.result()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, metavar='DATA', help='holds cifar-10-batches-py/')
    parser.add_argument('--results', type=Path, default=ROOT / 'docs/evidence/results.jsonl',
                        help='file to which finished runs are appended (docs/evidence/...)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/evidence'),
                        help='folder of the weights (%(default)s)')
    parser.add_argument('--only', default='.*', metavar='REGEX', help='names of runs to train')
    parser.add_argument('--workers', type=int, default=os.cpu_count(),
                        help='runs at a time (%(default)s)')
    return parser.parse_args()


def main():
    arguments = parse_args()
    if not (arguments.data / 'cifar-10-batches-py').is_dir():
        sys.exit(f'no cifar-10-batches-py/ in {arguments.data}. Unpack CIFAR-10 there.')
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    finished = set()
    if arguments.results.is_file():
        finished = {json.loads(line)['name'] for line in arguments.results.read_text().splitlines()}
    runs = [run for run in all_runs()
            if run.name not in finished and re.fullmatch(arguments.only, run.name)]
    print(f'{len(runs)} runs to train, {len(finished)} finished')
    for result in run_list(runs, arguments):
        with open(arguments.results, 'a', encoding='utf-8') as file:
            file.write(json.dumps(result) + '\n')


if __name__ == '__main__':
    main()
