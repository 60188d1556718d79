"""Parameters and multiply-adds of networks with CE layers."""
from contextlib import ExitStack
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..utils.files import PathLike
from .modules import ce_layers, evaluating


class Complexity(NamedTuple):
    """Of one forward pass in evaluation, in which `multiply_adds` are those of all products.

    `merged` follows Table 1, which has BD merged into the convolution before it (section 3.3): of
    CE there remain the subnetwork F and two passes over the map, for its variance and weights.
    """
    parameters: int
    multiply_adds: int
    merged: int


def complexity(model: nn.Module, run: Callable[[], object]) -> Complexity:
    """Count what `run` computes, which calls the model once on an input of the size in question."""
    counter = FlopCounterMode(display=False)
    starts, saved = {}, []

    def before(ce: nn.Module, inputs: Any) -> None:
        starts[ce] = counter.get_total_flops()

    def after(ce: Any, inputs: Any, output: Tensor) -> None:
        merged = 0
        if ce.has_ir:
            # v_n takes one for each element, w_n x another; F two products of C * C / r
            merged = 2 * output.numel() + 2 * len(output) * ce.in_channels**2 // ce.reduction
        saved.append((counter.get_total_flops() - starts[ce]) // 2 - merged)

    with ExitStack() as hooks, evaluating(model), counter:
        for ce in ce_layers(model).values():
            hooks.enter_context(ce.register_forward_pre_hook(before))
            hooks.enter_context(ce.register_forward_hook(after))
        run()
    computed = counter.get_total_flops() // 2
    return Complexity(sum(p.numel() for p in model.parameters()), computed, computed - sum(saved))


def config_complexity(path: PathLike, size: Optional[Tuple[int, int]] = None) -> Complexity:
    """Complexity of a config's model, for one generated image; an InputError without the config.

    `size` is its height and width, 800 x 1344 for detectors and 224 x 224 for classifiers if None.
    """
    from ..models.build import build_model, input_channels

    torch.manual_seed(0)
    model: Any = build_model(path)
    channels = input_channels(model)
    if not (hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')):
        image = torch.randn(1, channels, *(size or (224, 224)))
        return complexity(model, lambda: model(image))
    from mmdet.testing import demo_mm_inputs

    data = demo_mm_inputs(1, image_shapes=[(channels, *(size or (800, 1344)))], with_mask=True)
    data = model.data_preprocessor(data, False)
    return complexity(model, lambda: model(**data, mode='predict'))
