"""Which convolution, norm and CE follow each other, observed while the model runs.

While the model runs, a norm gets the very tensor that the convolution returned. Whether other code
reads it too, such as a residual addition or an in-place ReLU, shows in the operators that take it.
"""
from collections import defaultdict
from typing import Any, Dict, List, Optional, Set, Tuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers import CE
from ..models.insert import FROZEN, activation_of, is_norm
from ..utils.errors import InputError
from .compare import deviation, run, tensors

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
Module = Optional[nn.Module]  # None stands for code outside of the modules that are watched
# one of LAYERS or None, a norm, a batch norm that does what the norm does, and CE or None
Chain = Tuple[Module, nn.Module, nn.Module, Optional[CE]]


def trace(model: nn.Module, example: Any, tolerance: float) -> Tuple[Any, List[Chain]]:
    """Run a model in evaluation mode: its output, and which of its layers follow each other.

    Raises:
        InputError: a CE layer that the example reaches cannot be folded.
    """
    flow = Flow(tolerance)
    handles = [handle for module in model.modules() for handle in flow.watch(module)]
    with flow:
        output = run(model, example)
    flow.read(output)
    for handle in handles:
        handle.remove()
    problems: Dict[str, List[str]] = {}
    for name, ce in model.named_modules():
        if isinstance(ce, CE) and ce in flow.sources and (problem := flow.problem(ce)):
            problems.setdefault(problem, []).append(name or 'the model')
    if problems:
        raise InputError('these layers cannot be folded: ' + '; '.join(
            f'{", ".join(names)} ({problem})' for problem, names in problems.items()))
    return output, flow.chains()


class Flow(TorchDispatchMode):
    """Records which modules made a module's input, and which read its output, over all calls."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.sources: Dict[Module, Set[Module]] = defaultdict(set)
        self.readers: Dict[Module, Set[Module]] = defaultdict(set)
        # for each norm, a batch norm that computes the same; None if there is none
        self.batch_norms: Dict[Module, Module] = {}
        self.running: List[Module] = [None]  # the modules that are being called

    def watch(self, module: nn.Module) -> List:
        """Hook a module that may be part of a chain; the handles. Others' hooks rule it out."""
        if (module._forward_hooks or module._forward_pre_hooks or 'forward' in vars(module)
                or not (is_layer(module) or is_norm(module) or isinstance(module, CE))):
            return []
        return [module.register_forward_pre_hook(self.before),
                module.register_forward_hook(self.after)]

    def before(self, module: nn.Module, inputs: Tuple) -> None:
        self.sources[module].add(getattr(inputs[0], 'made_by', None) if inputs else None)
        self.running.append(module)

    def after(self, module: nn.Module, inputs: Tuple, output: Any) -> None:
        if is_norm(module) and self.batch_norms.get(module, module) is not None:
            self.batch_norms[module] = as_batch_norm(module, inputs, output, self.tolerance)
        self.running.pop()
        if isinstance(output, Tensor):
            vars(output)['made_by'] = module
            if is_layer(module) and output.dim() != module._parameters['weight'].dim():
                self.readers[module].add(None)  # its channels are not in dimension 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read((args, kwargs))
        return func(*args, **(kwargs or {}))

    def read(self, values: Any) -> None:
        for tensor in tensors(values):
            if hasattr(tensor, 'made_by'):
                self.readers[tensor.made_by].add(self.running[-1])

    def chains(self) -> List[Chain]:
        """Modules that follow each other; nothing else reads what goes from one to the next."""
        found: List[Chain] = []
        for norm, batch_norm in self.batch_norms.items():
            layer, ce = _only(self.sources[norm]), self._follower(norm)
            layer = layer if is_layer(layer) and self._follower(layer) is norm else None
            ce = ce if isinstance(ce, CE) and self.problem(ce) is None else None
            if batch_norm is not None and (layer, ce) != (None, None):
                found.append((layer, norm, batch_norm, ce))
        return found

    def _follower(self, module: nn.Module) -> Module:
        """The one that reads all outputs of the module, and gets no other input."""
        reader = _only(self.readers[module])
        return reader if self.sources.get(reader) == {module} else None

    def problem(self, ce: CE) -> Optional[str]:
        """Why CE, which was called, cannot be folded; None if it can."""
        norm = _only(self.sources[ce])
        if ce.uses_batch_statistics or getattr(norm, 'training', False):
            return 'it or its norm is in training mode; call model.eval() first'
        if not ce.num_batches_tracked:
            return 'its statistics were never trained or loaded; load a checkpoint first'
        if norm not in self.batch_norms:
            return 'its input is not the output of one norm'
        if self.batch_norms[norm] is None:
            return (f'its norm is a {type(norm).__name__}; only batch norms with running '
                    'statistics can be folded')
        if self._follower(norm) is not ce or activation_of(norm) is not None:
            return 'something else reads or changes the output of its norm'
        return None


def is_layer(module: Module) -> bool:
    """Whether it is one of LAYERS, with plain weights and no forward of its own."""
    base = next((layer for layer in LAYERS if isinstance(module, layer)), None)
    return base is not None and 'weight' in module._parameters and all(
        getattr(type(module), name, None) is getattr(base, name, None)
        for name in ('forward', '_conv_forward'))


def as_batch_norm(norm: nn.Module, inputs: Tuple, output: Tensor, tolerance: float) -> Module:
    """A batch norm that, before the norm's activation, did the same in a call; None without one."""
    values = {name: getattr(norm, name, None) for name in FROZEN}
    mean = values['running_mean']
    if mean is None or len(inputs) != 1:
        return None
    # Some frozen batch norms have their eps in the code. Whether it is this one, the output shows.
    batch_norm = BATCH_NORMS[inputs[0].dim()](
        len(mean), eps=getattr(norm, 'eps', 1e-5), affine=values['weight'] is not None,
        device=mean.device, dtype=mean.dtype).eval()
    batch_norm.load_state_dict({name: value for name, value in values.items()
                                if value is not None}, strict=False)
    expected = (activation_of(norm) or nn.Identity())(batch_norm(inputs[0]))
    return batch_norm if deviation([output], [expected]) <= tolerance else None


def _only(modules: Set[Module]) -> Module:
    """The only one of a set, or None."""
    return next(iter(modules)) if len(modules) == 1 else None
