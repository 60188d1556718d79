"""The dense part of a network as an ONNX file, for images of any size.

Dense is what comes before proposals, RoIs and suppression, which other runtimes have
operators of their own for: backbone, neck, and the head that sees the feature maps.
"""
import importlib.util
import os
from pathlib import Path
from typing import Dict, Iterator, List, Tuple, Union

import torch
from torch import Tensor, nn

from ..utils.compat import CAN_EXPORT

STRIDE = 32  # heights and widths are multiples of it, as MMDetection pads them
PACKAGES = ('onnx', 'onnxscript')


class DensePart(nn.Module):
    """Feature maps, and the outputs of the dense head on them, as a flat tuple.

    Args:
        model: an MMDetection detector or MMPretrain classifier, or a backbone alone.

    Shape:
        - Input: preprocessed images, (N, 3, H, W).
        - Output: tensors, named by `names`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None)
        self.head = next((head for head in (getattr(model, name, None) for name in (
            'rpn_head', 'bbox_head', 'head')) if head is not None), None)

    def outputs(self, images: Tensor) -> Dict[str, Tensor]:
        """As forward's, by name: feature0 (of the largest map) and so on, head0_0 and so on."""
        features = self.backbone(images)
        if self.neck is not None:
            features = self.neck(features)
        named = {f'feature{i}': feature for i, feature in enumerate(_flat(features))}
        if self.head is not None:
            for i, output in enumerate(_flat(self.head(features))):
                named[f'head{i}'] = output
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
        The names of the outputs: feature maps first, then what the head makes of them.

    Raises:
        ImportError: if torch is older than 2.7, or a package that it needs for ONNX is not
            installed.
        ValueError: if H or W is no multiple of 32.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {" and ".join(missing)}: '
                          f'pip install {" ".join(missing)}')
    if any(size % STRIDE for size in images.shape[2:]):
        raise ValueError(f'height and width must be multiples of {STRIDE}, '
                         f'got {images.shape[2]} x {images.shape[3]}')
    if not CAN_EXPORT:
        raise ImportError(f'ONNX export needs torch 2.7 or newer, this is {torch.__version__}: '
                          'fold and export in an environment with a newer one')
    dense = DensePart(model).eval()
    with torch.no_grad():
        names = list(dense.outputs(images))
        height, width = (STRIDE * torch.export.Dim(name, min=2, max=256) for name in 'hw')
        program = torch.onnx.export(dense, (images, ), dynamo=True, input_names=['images'],
                                    output_names=names, verbose=False,
                                    dynamic_shapes={'images': {2: height, 3: width}})
    unfinished = Path(path).with_name(f'.{Path(path).name}.part')
    try:
        program.save(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return names


def _flat(outputs) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from _flat(output)
