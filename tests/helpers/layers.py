"""What the tests of layers share: inputs, states, and what a graph keeps."""
import torch
from torch import nn

# Mean and deviation of eight channels. The inhibited ones have gamma 1e-3 and beta 0.3.
OFFSETS = {**{f'mean/std {ratio}': [(ratio, 1)] * 8 for ratio in (1, 10, 100, 1000)},
           'inhibited': [(0.3, 1e-3)] * 4 + [(0.3, 1)] * 4}


def random_input(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(*layers):
    return {f'{index}.{name}': value.clone() for index, layer in enumerate(layers)
            for name, value in layer.state_dict().items()}


def same_state(before, *layers):
    after = state(*layers)
    assert before.keys() == after.keys()
    return all(torch.equal(before[name], value) for name, value in after.items())


def check_gradients(layer, x):
    """Of the input and of all parameters, first and second order."""
    names = [name for name, _ in layer.named_parameters()]
    inputs = [t.detach().clone().requires_grad_() for t in (x, *layer.parameters())]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, ))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def kept_maps(function, size):
    """Storages of at least `size` entries that the graph of a call keeps."""
    kept = set()

    def pack(tensor):
        if tensor.numel() >= size:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive, so that no storage has the address of another
    del result
    return kept


def covariance_error(covariance, parts, std):
    """Largest error of a covariance of float32 maps (1, 1, d, L), in units of the deviations."""
    pixels = torch.cat([part.double().transpose(0, 2).flatten(1) for part in parts], 1)
    return ((covariance[0] - torch.cov(pixels, correction=0)) / (std * std.T)).abs().max()


def strengthened(model):
    """The model with CE layers that no longer compute the identity."""
    for layer in model.modules():
        if getattr(layer, 'identity_start', False):
            nn.init.constant_(layer.strength, 0.7)
    return model
