"""Slim networks, trained a little, and their entries under the authors' names."""
import torch

# Arguments that make a ResNet small enough for a test, with the structure of the full one.
SLIM = dict(base_channels=8, stem_channels=8)


def images(count=2, *size):
    """Random images, the same every time."""
    size = size or (64, 64)
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def trained(backbone):
    """The backbone with parameters and statistics that no initial one has."""
    torch.manual_seed(0)
    backbone.train()
    with torch.no_grad():
        for value in backbone.parameters():
            value.add_(0.01 * torch.randn_like(value))
        backbone(images())
    return backbone


def released_entries(backbone):
    """The backbone's entries with the authors' names and shapes, written out layer by layer."""
    layers = dict(backbone.ce_layers())
    entries = {key: value for key, value in backbone.state_dict().items()
               if not key.startswith(tuple(f'{name}.' for name in layers))}
    for name, ce in layers.items():
        down, norm, _, up, _ = ce.reweighting
        values = {'x_weight': ce.lambda_logit,
                  'running_mean': ce.running_mean.reshape(ce.num_groups, ce.group_size, 1),
                  'running_wm': ce.running_whitening, 'AR.running_scale': ce.running_scale,
                  'AR.fc.0.weight': down.weight, 'AR.fc.1.weight': norm.weight,
                  'AR.fc.1.bias': norm.bias, 'AR.fc.3.weight': up.weight}
        entries.update({f'{name}.{key}': value.detach() for key, value in values.items()})
    return entries
