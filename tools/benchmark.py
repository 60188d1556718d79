#!/usr/bin/env python3
"""Compare whole detectors: time of a training step, and tensors kept for the backward pass.

    python tools/benchmark.py configs/mask_rcnn_r50.py configs/mask_rcnn_ce_r50.py

Each config's model is built with random weights and trained on generated images; the
steps of all models are interleaved, and the table gives ratios to the first.
"""
import argparse
import statistics
import time
from pathlib import Path

SGD = dict(lr=0., momentum=0.9)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='the first is what the others are compared to')
    parser.add_argument('--size', type=int, nargs=2, default=(800, 1344),
                        metavar=('HEIGHT', 'WIDTH'), help='of the images (800 1344)')
    parser.add_argument('--images', type=int, default=2, help='in a step (%(default)s)')
    parser.add_argument('--repeats', type=int, default=3,
                        help='timed steps of each model, after one that is not (%(default)s)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    return parser.parse_args()


def training_step(model, optimizer, data):
    """Seconds of one step."""
    import torch

    start = time.perf_counter()
    model.train_step(data, optimizer)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept_for_backward(model, data):
    """Bytes of all distinct tensors that one forward pass keeps, parameters left out."""
    import torch

    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = model.data_preprocessor(data, True)
        model(**inputs, mode='loss')
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in kept.values())


def measure(arguments):
    """For each config: seconds of its steps, bytes kept."""
    import torch
    from _mmdet import build_model
    from mmdet.testing import demo_mm_inputs
    from mmengine.optim import OptimWrapper
    from rich.progress import track

    torch.manual_seed(0)
    data = demo_mm_inputs(arguments.images, image_shapes=[(3, *arguments.size)] * arguments.images,
                          num_items=[8] * arguments.images, with_mask=True,
                          device=arguments.device)
    models = [build_model(path).to(arguments.device).train() for path in arguments.configs]
    optimizers = [OptimWrapper(torch.optim.SGD(model.parameters(), **SGD)) for model in models]
    kept = [kept_for_backward(model, data) for model in models]
    seconds = [[] for _ in models]
    for _ in track(range(arguments.repeats + 1), 'steps of all models'):
        for model, optimizer, times in zip(models, optimizers, seconds):
            times.append(training_step(model, optimizer, data))
    return [(times[1:], size) for times, size in zip(seconds, kept)]


def print_table(configs, results):
    from rich.console import Console
    from rich.table import Table

    table = Table(title='training step, in units of the first row')
    for column in ('config', 'time', 'from', 'to', 'kept for backward', 'GB'):
        table.add_column(column, justify='left' if column == 'config' else 'right')
    first_times, first_size = results[0]
    for path, (times, size) in zip(configs, results):
        ratios = sorted(time / first for time, first in zip(times, first_times))
        table.add_row(Path(path).stem, *(f'{ratio:.2f}' for ratio in
                                         (statistics.median(ratios), ratios[0], ratios[-1])),
                      f'{size / first_size:.2f}', f'{size / 1e9:.2f}')
    Console(soft_wrap=True).print(table)


def main():
    arguments = parse_args()
    print_table(arguments.configs, measure(arguments))


if __name__ == '__main__':
    main()
