"""The dense part of a network as an ONNX file, for images of any size.

The dense part comes before proposals, RoIs and suppression, which other runtimes have their own
operators for: backbone, neck, and the head that sees the feature maps.
"""
import importlib.util
import os
from typing import Dict, List, Tuple, Union

import torch
from torch import Tensor, nn

from ..utils.compat import CAN_EXPORT
from ..utils.errors import InputError
from ..utils.files import replacing
from .compare import tensors

STRIDE = 32  # heights and widths are multiples of it, as MMDetection pads them
PACKAGES = ('onnx', 'onnxscript')


class DensePart(nn.Module):
    """Feature maps, and the outputs of the dense head on them, as a flat tuple.

    It shares its modules with the model: `fuse_ce(DensePart(model), images)` folds the model's.

    Args:
        model: an MMDetection detector or MMPretrain classifier, or a backbone alone.

    Shape:
        - Input: preprocessed images, (N, 3, H, W).
        - Output: tensors, named by `names`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None)
        self.head = next((head for head in (getattr(model, name, None) for name in (
            'rpn_head', 'bbox_head', 'head')) if head is not None), None)

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        """Outputs of forward by name: feature0 (the largest map), feature1 ..., head0, head1 ..."""
        features = self.backbone(images)
        if self.neck is not None:
            features = self.neck(features)
        named = {f'feature{i}': feature for i, feature in enumerate(tensors(features))}
        if self.head is not None:
            outputs = tensors(self.head(features))
            named.update({f'head{i}': output for i, output in enumerate(outputs)})
        return named

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self.outputs(images).values())


def export_onnx(model: nn.Module, path: Union[str, os.PathLike], images: Tensor) -> List[str]:
    """Write the dense part of a model as ONNX; height and width stay variable.

    Args:
        model: folded by `fuse_ce` or not, in evaluation mode, on the CPU.
        path: of the file to be written.
        images: an example, (N, 3, H, W) with H and W multiples of 32; N is fixed by it.

    Returns:
        The names of the outputs, as in `DensePart.outputs`.

    Raises:
        InputError: torch is older than 2.7, a package for ONNX is missing, or H or W is not a
            multiple of 32.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX export needs {" and ".join(missing)}: '
                         f'pip install {" ".join(missing)}')
    if any(size % STRIDE for size in images.shape[2:]):
        raise InputError(f'height and width must be multiples of {STRIDE}, '
                         f'got {images.shape[2]} x {images.shape[3]}')
    if not CAN_EXPORT:
        raise InputError(f'ONNX export needs torch 2.7 or newer, this is {torch.__version__}: '
                         'fold and export in an environment with a newer one')
    dense = DensePart(model)
    with torch.no_grad():
        names = list(dense.outputs(images))
        height, width = (STRIDE * torch.export.Dim(name, min=2, max=256) for name in 'hw')
        program = torch.onnx.export(dense, (images, ), dynamo=True, input_names=['images'],
                                    output_names=names, verbose=False,
                                    dynamic_shapes={'images': {2: height, 3: width}})
    with replacing(path) as partial:
        program.save(str(partial))
    return names
