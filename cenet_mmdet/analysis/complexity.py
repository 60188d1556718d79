"""Parameters and multiply-adds of networks with CE layers."""
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import CE


class Complexity(NamedTuple):
    """Of one forward pass, in evaluation.

    `multiply_adds` are those of all products that are computed: convolutions,
    linear layers, and CE's operators, which are batched products rather than
    layers. `merged` follows Table 1, which has BD merged into the convolution
    before it (section 3.3, "inference"): of CE there remain two passes over the
    feature map, for its variance and for the reweighting, and the subnetwork F.
    """
    parameters: int
    multiply_adds: int
    merged: int


def complexity(model: nn.Module, run: Callable[[], object]) -> Complexity:
    """Count what `run`, which calls the model once, computes.

    Args:
        model: the network.
        run: calls it on an input of the size in question; gradients need not
            be off.
    """
    counter = FlopCounterMode(display=False)
    layers = [layer for layer in model.modules() if isinstance(layer, CE)]
    meters = [_Meter(layer, counter) for layer in layers]
    training = model.training
    model.eval()
    try:
        with counter:
            run()
    finally:
        model.train(training)
        for meter in meters:
            meter.remove()
    total = counter.get_total_flops() // 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    merged = total + sum(meter.merged - meter.computed for meter in meters)
    return Complexity(parameters, total, merged)


class _Meter:
    """Multiply-adds of one CE layer, as computed and as merged."""

    def __init__(self, layer: CE, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.computed = self.merged = 0
        self.handles = (layer.register_forward_pre_hook(self.before),
                        layer.register_forward_hook(self.after))

    def before(self, layer: CE, inputs) -> None:
        self.start = self.counter.get_total_flops()

    def after(self, layer: CE, inputs, output) -> None:
        self.computed += (self.counter.get_total_flops() - self.start) // 2
        if layer.has_ir:
            # v_n takes one for each element, w_n x another; F two products of C * C / r
            subnetwork = 2 * len(output) * layer.in_channels**2 // layer.reduction
            self.merged += 2 * output.numel() + subnetwork

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def config_complexity(path, size: Optional[Tuple[int, int]] = None) -> Complexity:
    """Complexity of a config's model with random weights, for one generated image.

    Args:
        path: of the config of a detector or classifier.
        size: height and width of the image; 800 x 1344 for detectors, 224 x 224 for classifiers.

    Raises:
        InputError: there is no such config.
    """
    from ..models.build import build_model, input_channels

    torch.manual_seed(0)
    model = build_model(path)
    channels = input_channels(model)
    if not (hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')):
        image = torch.randn(1, channels, *(size or (224, 224)))
        return complexity(model, lambda: model(image))
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(1, image_shapes=[(channels, *(size or (800, 1344)))], with_mask=True)
    data = model.data_preprocessor(data, False)
    return complexity(model, lambda: model(**data, mode='predict'))
