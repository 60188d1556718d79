#!/usr/bin/env python3
"""What CE costs: layers against batch norm, whole models against each other.

    python tools/benchmark.py layers --json layers.json --plot layers.png
    python tools/benchmark.py models configs/mask_rcnn_r50.py configs/mask_rcnn_ce_r50.py
    python tools/benchmark.py inference configs/mask_rcnn_r50.py configs/mask_rcnn_ce_r50.py
    python tools/benchmark.py operations
    python tools/benchmark.py growth

Everything is a ratio within one run: the candidates take turns, each turn gives a ratio
to the first candidate, and the table has the median of these; their range is in the
picture, or beside it, and all of them in the JSON file. `layers` uses the shapes of
ResNet-50's three CE stages at 224 x 224 and at 800 x 1344. `inference` compares models as
they are and with their norms and CE folded (`fuse_ce`). `operations` counts what each layer
launches, which is the same on every machine. `growth` varies one number of a layer at a time, and
shows the least time that its bytes and multiply-adds need on this machine.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

SIZES = {'detector': (800, 1344), 'classifier': (224, 224)}
# C, H, W of layer1 to layer3
SHAPES = [(256, 56, 56), (512, 28, 28), (1024, 14, 14),
          (256, 200, 336), (512, 100, 168), (1024, 50, 84)]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest='kind', required=True)
    layers = kinds.add_parser('layers', help='CE, BN + CE, IterNorm, against batch norm')
    layers.add_argument('--plot', type=Path, metavar='PNG', help='draw the ratios')
    layers.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
                        help='type of the feature maps (%(default)s)')
    layers.add_argument('--channels-last', action='store_true',
                        help='memory format of the feature maps')
    models = kinds.add_parser('models', help='training steps of detectors or classifiers')
    inference = kinds.add_parser('inference', help='evaluation of models, folded or not')
    inference.add_argument('--backbone', action='store_true', help='only that')
    for kind in (models, inference):
        kind.add_argument('configs', nargs='+',
                          help='the first is what the others are compared to')
        kind.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                          help='of the images (800 1344 for detectors, 224 224 for classifiers)')
    operations = kinds.add_parser('operations', help='what each layer launches')
    growth = kinds.add_parser('growth', help='CE by channels, group size, pixels and images')
    for kind in (layers, models, inference):
        kind.add_argument('--images', type=int, default=2, help='in a step (%(default)s)')
    for kind in (layers, models, inference, growth):
        kind.add_argument('--repeats', type=int, default=5,
                          help='timed turns, after one that is not (%(default)s)')
        kind.add_argument('--device', default='cpu', help='cpu or cuda (%(default)s)')
    for kind in (layers, models, inference, growth, operations):
        kind.add_argument('--json', type=Path, help='write the numbers to this file')
    return parser.parse_args()


def take_turns(candidates, repeats):
    """Seconds of each candidate, a function without arguments, in each turn but the first.

    Each is called twice in its turn, and timed the second time: it then finds the heap as
    it leaves it itself, and not as the one before it did.
    """
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, function in candidates.items():
            function()
            wait()
            start = time.perf_counter()
            function()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def ratios(seconds):
    """Sorted ratios to the first candidate, turn by turn."""
    first = next(iter(seconds.values()))
    return {name: sorted(a / b for a, b in zip(times, first)) for name, times in seconds.items()}


def layer_candidates(shape, images, device, training, group_size=16, dtype='float32',
                     channels_last=False):
    """Forward (and backward, in training) of each layer on one feature map."""
    import torch
    from mmdet.models.layers import SELayer
    from torch import nn

    from cenet_mmdet import CE, IterNorm
    from cenet_mmdet.layers.fused import batch_norm_ce
    from cenet_mmdet.layers.reference import reference_ce

    channels = shape[0]
    norm, ce, whitening, excitation = (layer.to(device).train(training) for layer in (
        nn.BatchNorm2d(channels), CE(channels, group_size=group_size),
        IterNorm(channels, group_size=16), SELayer(channels)))
    x = torch.randn(images, *shape, device=device, dtype=getattr(torch, dtype)).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x.requires_grad_(training)
    grad = torch.randn_like(x)

    def run(function):
        def step():
            with torch.set_grad_enabled(training), torch.autocast(
                    torch.device(device).type, x.dtype, enabled=dtype != 'float32'):
                out = function(x)
            if training:
                out.backward(grad)
                x.grad = None
        return step

    functions = {'BN': norm, 'CE': ce, 'CE, plain': lambda x: reference_ce(ce, [x])[0][0],
                 'BN + CE': lambda x: batch_norm_ce(norm, ce, x),
                 'BN, then CE': lambda x: ce(norm(x)), 'IterNorm': whitening, 'SE': excitation}
    return {name: run(function) for name, function in functions.items()}


def measure_layers(arguments):
    """Ratios by mode, shape and layer."""
    from rich.progress import track

    results = {}
    for training in (True, False):
        mode = 'training, forward + backward' if training else 'evaluation, forward'
        results[mode] = {'x'.join(map(str, shape)): ratios(take_turns(
            layer_candidates(shape, arguments.images, arguments.device, training,
                             dtype=arguments.dtype, channels_last=arguments.channels_last),
            arguments.repeats)) for shape in track(SHAPES, mode)}
    return results


def show_layers(results, plot):
    from rich.console import Console
    from rich.table import Table

    for mode, shapes in results.items():
        table = Table(title=f'{mode}, in units of batch norm')
        table.add_column('layer')
        for shape in (*shapes, 'mean'):
            table.add_column(shape, justify='right')
        for name in next(iter(shapes.values())):
            medians = [statistics.median(by_layer[name]) for by_layer in shapes.values()]
            table.add_row(name, *(f'{m:.2f}' for m in (*medians, statistics.mean(medians))))
        Console(soft_wrap=True).print(table)
    if plot:
        draw_layers(results, plot)


def draw_layers(results, path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(11, 4), layout='constrained')
    for axis, (mode, shapes) in zip(axes, results.items()):
        for name in next(iter(shapes.values())):
            values = [by_layer[name] for by_layer in shapes.values()]
            middle = [statistics.median(v) for v in values]
            spread = [[m - v[0] for m, v in zip(middle, values)],
                      [v[-1] - m for m, v in zip(middle, values)]]
            axis.errorbar(range(len(shapes)), middle, spread, marker='o', capsize=3, label=name)
        axis.set(title=mode, yscale='log', ylabel='time / batch norm')
        axis.set_xticks(range(len(shapes)), shapes, rotation=20)
        ticks = [1, 2, 3, 5, 10, 20, 40, 80, 160]
        axis.set_yticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid(alpha=.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure_operations(arguments):
    """Operations of each layer: forward and backward in training, forward in evaluation."""
    import torch

    from cenet_mmdet.analysis.operations import CountOperations

    counts = {}
    for training in (True, False):
        for name, step in layer_candidates((64, 8, 8), 2, 'cpu', training).items():
            step()  # the first call may look at things
            with CountOperations() as counted, torch.set_grad_enabled(training):
                step()
            mode = 'training' if training else 'evaluation'
            counts.setdefault(name, {})[mode] = sum(counted.operations.values())
    return counts


def show_operations(counts):
    print(f'{"operations":14}{"forward + backward":>20}{"evaluation":>12}')
    for name, modes in counts.items():
        print(f'{name:14}{modes["training"]:20}{modes["evaluation"]:12}')


def measure_growth(arguments):
    """Seconds of a training step of CE and of batch norm, by what is varied."""
    from rich.progress import track

    start = {'channels': 256, 'group size': 16, 'height, width': 56, 'images': 2}
    varied = {'channels': (64, 256, 1024), 'group size': (4, 16, 64, 256),
              'height, width': (14, 56, 224), 'images': (1, 2, 8)}
    cases = [(what, {**start, what: value}) for what, values in varied.items() for value in values]
    bytes_a_second, products_a_second = machine_limits(arguments.device)
    rows = []
    for what, case in track(cases, 'growth'):
        side = case['height, width']
        shape = (case['channels'], side, side)
        candidates = layer_candidates(shape, case['images'], arguments.device, True,
                                      case['group size'])
        seconds = take_turns({name: candidates[name] for name in ('BN', 'CE')}, arguments.repeats)
        elements = case['images'] * case['channels'] * side ** 2
        # Moments, operator, and two and three products in the backward pass; x is read by
        # all of them, its gradient and the output's as well, and two maps are written.
        products, moved = 5 * case['group size'] * elements, 4 * 8 * elements
        rows.append(dict(varied=what, value=case[what], ratio=ratios(seconds)['CE'],
                         seconds=statistics.median(seconds['CE']),
                         by_bytes=moved / bytes_a_second, by_products=products / products_a_second,
                         bytes_a_collective=collective_bytes(case)))
    return rows


def machine_limits(device):
    """Bytes a second that a copy moves, and multiply-adds a second of a large product."""
    import torch

    source, matrix = torch.zeros(1 << 26, device=device), torch.zeros(2048, 2048, device=device)
    target, product = torch.zeros_like(source), torch.zeros_like(matrix)
    seconds = take_turns({'copy': lambda: target.copy_(source),
                          'product': lambda: torch.mm(matrix, matrix, out=product)}, 5)
    return 8 * source.numel() / min(seconds['copy']), 2048 ** 3 / min(seconds['product'])


def collective_bytes(case):
    """What SyncCE sends: two counts, means, upper triangles and variances, in float64."""
    channels, d = case['channels'], case['group size']
    return 8 * (2 + 2 * channels + channels * (d + 1) // 2)


def show_growth(rows):
    from rich.console import Console
    from rich.table import Table

    table = Table(title='training step of CE; 256 x 56 x 56, groups of 16, 2 images, but for')
    for column in ('', '', 'CE / BN', 'least time by bytes', 'by multiply-adds',
                   'KB a collective'):
        table.add_column(column, justify='right')
    for row in rows:
        table.add_row(row['varied'], str(row['value']), f"{statistics.median(row['ratio']):.2f}",
                      *(f"{row[limit] / row['seconds']:.2f} of measured"
                        for limit in ('by_bytes', 'by_products')),
                      f"{row['bytes_a_collective'] / 1024:.1f}")
    Console(soft_wrap=True).print(table)


def model_data(model, images, size, device):
    """Generated images with what their model learns from them."""
    import torch

    from cenet_mmdet.models.build import input_channels

    channels = input_channels(model)
    if hasattr(model, 'head'):  # a classifier
        from mmpretrain.structures import DataSample
        height, width = size or SIZES['classifier']
        return dict(inputs=[torch.zeros(channels, height, width) for _ in range(images)],
                    data_samples=[DataSample().set_gt_label(0) for _ in range(images)])
    from mmdet.testing import demo_mm_inputs
    return demo_mm_inputs(images, image_shapes=[(channels, *(size or SIZES['detector']))] * images,
                          num_items=[8] * images, num_classes=2, with_mask=True, device=device)


def kept_for_backward(model, data):
    """Bytes of all distinct tensors that one forward pass keeps, parameters left out."""
    import torch

    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**model.data_preprocessor(data, True), mode='loss')
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in kept.values())


def measure_models(arguments):
    """Ratios of a training step, and bytes kept for the backward pass, by config."""
    import torch
    from mmengine.optim import OptimWrapper

    from cenet_mmdet.models.build import build_model

    torch.manual_seed(0)
    steps, kept = {}, {}
    for path in arguments.configs:
        model = build_model(path).to(arguments.device).train()
        data = model_data(model, arguments.images, arguments.size, arguments.device)
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0., momentum=0.9))
        name = Path(path).stem
        kept[name] = kept_for_backward(model, data)
        steps[name] = lambda model=model, data=data, optimizer=optimizer: model.train_step(
            data, optimizer)
    return dict(time=ratios(take_turns(steps, arguments.repeats)), kept_bytes=kept)


def measure_inference(arguments):
    """Ratios of evaluation to that of the first model folded."""
    import copy

    import torch

    from cenet_mmdet import CE
    from cenet_mmdet.deploy import fuse_ce
    from cenet_mmdet.deploy.export import DensePart
    from cenet_mmdet.models.build import build_model, input_channels

    torch.manual_seed(0)
    runs = {}
    for path in arguments.configs:
        model = build_model(path).to(arguments.device)
        model.eval()
        for ce in model.modules():
            if isinstance(ce, CE):
                ce.num_batches_tracked.fill_(1)  # what the statistics are takes no time
        folded = copy.deepcopy(model)
        fuse_ce(DensePart(folded),
                torch.randn(1, input_channels(model), 224, 224, device=arguments.device))
        runs[f'{Path(path).stem}, folded'] = evaluation(folded, arguments)
        runs[Path(path).stem] = evaluation(model, arguments)
    return ratios(take_turns(runs, arguments.repeats))


def evaluation(model, arguments):
    """A function that evaluates the model, or its backbone, on generated images."""
    import torch

    data = model_data(model, arguments.images, arguments.size, arguments.device)
    inputs = model.data_preprocessor(data, False)['inputs']

    @torch.inference_mode()
    def run():
        if arguments.backbone:
            model.backbone(inputs)
        else:
            model.test_step(data)
    return run


def show_inference(results):
    from rich.console import Console
    from rich.table import Table

    table = Table(title='evaluation, in units of the first row')
    for column in ('model', 'time', 'from', 'to'):
        table.add_column(column, justify='left' if column == 'model' else 'right')
    for name, values in results.items():
        table.add_row(name, *(f'{v:.2f}' for v in (statistics.median(values), values[0],
                                                   values[-1])))
    Console(soft_wrap=True).print(table)


def show_models(results):
    from rich.console import Console
    from rich.table import Table

    table = Table(title='training step, in units of the first row')
    for column in ('config', 'time', 'from', 'to', 'kept for backward', 'GB'):
        table.add_column(column, justify='left' if column == 'config' else 'right')
    first = next(iter(results['kept_bytes'].values()))
    for name, values in results['time'].items():
        size = results['kept_bytes'][name]
        table.add_row(name, *(f'{value:.2f}' for value in (statistics.median(values), values[0],
                                                           values[-1], size / first)),
                      f'{size / 1e9:.2f}')
    Console(soft_wrap=True).print(table)


def main(arguments):
    if arguments.kind == 'layers':
        results = measure_layers(arguments)
        show_layers(results, arguments.plot)
    elif arguments.kind == 'inference':
        results = measure_inference(arguments)
        show_inference(results)
    elif arguments.kind == 'operations':
        results = measure_operations(arguments)
        show_operations(results)
    elif arguments.kind == 'growth':
        results = measure_growth(arguments)
        show_growth(results)
    else:
        results = measure_models(arguments)
        show_models(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    arguments = parse_args()
    # The package takes seconds to import; --help answers at once.
    from cenet_mmdet.utils.errors import exit_on_input_error
    with exit_on_input_error():
        main(arguments)
