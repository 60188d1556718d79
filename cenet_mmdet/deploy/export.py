"""The dense part of a network as an ONNX file, for images of any size."""
from importlib.util import find_spec
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..utils.compat import CAN_EXPORT
from ..utils.errors import InputError
from ..utils.files import PathLike, replacing
from .compare import tensors

STRIDE = 32  # heights and widths are multiples of it, as MMDetection pads them


class DensePart(nn.Module):
    """Backbone, neck and dense head, without what follows them, such as proposals and suppression.

    It shares its modules with the model: `fuse_ce(DensePart(model), images)` folds the model's.

    Args:
        model: an MMDetection detector or MMPretrain classifier, or a backbone alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None) or nn.Identity()
        heads = [getattr(model, name, None) for name in ('rpn_head', 'bbox_head', 'head')]
        self.head = next(filter(None, heads), None)

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        """Outputs for images (N, 3, H, W): feature0 (the largest map), feature1 ..., head0 ..."""
        features = self.neck(self.backbone(images))
        found = {'feature': features, 'head': () if self.head is None else self.head(features)}
        return {f'{kind}{index}': output for kind in found
                for index, output in enumerate(tensors(found[kind]))}

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self.outputs(images).values())


def export_onnx(model: nn.Module, path: PathLike, images: Tensor) -> List[str]:
    """Write the dense part of a model as ONNX, and return the names of its outputs.

    Args:
        model: folded by `fuse_ce` or not, in evaluation mode, on the CPU.
        path: of the file to be written.
        images: an example, (N, 3, H, W). H and W, multiples of 32, stay variable; N is fixed.

    Raises:
        InputError: H or W is no multiple of 32, torch is older than 2.7, or a package is missing.
    """
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX export needs {" and ".join(missing)}: '
                         f'pip install {" ".join(missing)}')
    height, width = images.shape[2:]
    if height % STRIDE or width % STRIDE:
        raise InputError(f'height and width must be multiples of {STRIDE}, got {height} x {width}')
    if not CAN_EXPORT:
        raise InputError(f'ONNX export needs torch 2.7 or newer, this is {torch.__version__}')
    dense = DensePart(model)
    sizes = {dim: STRIDE * torch.export.Dim(name, min=2, max=256)
             for dim, name in ((2, 'h'), (3, 'w'))}
    with torch.no_grad():
        names = list(dense.outputs(images))
        program = torch.onnx.export(
            dense, (images, ), dynamo=True, input_names=['images'], output_names=names,
            verbose=False, dynamic_shapes={'images': sizes})
    with replacing(path) as partial:
        program.save(str(partial))
    return names
