"""Keys of the authors' released layer, so that their checkpoints load as they are."""
import torch

# released name -> ours
RELEASED_KEYS = {
    'x_weight': 'lambda_logit',
    'running_wm': 'running_whitening',
    'AR.running_scale': 'running_scale',
    'AR.fc.0.weight': 'reweighting.0.weight',
    'AR.fc.1.weight': 'reweighting.1.weight',
    'AR.fc.1.bias': 'reweighting.1.bias',
    'AR.fc.3.weight': 'reweighting.3.weight',
}


def rename_released_keys(state_dict: dict, prefix: str) -> None:
    """Rename the released layer's entries under `prefix` in place; ours stay as they are.

    The released layer counts no batches. Its statistics are set all the same,
    which `num_batches_tracked` = 1 records.
    """
    released = [name for name in RELEASED_KEYS if prefix + name in state_dict]
    for name in released:
        state_dict[prefix + RELEASED_KEYS[name]] = state_dict.pop(prefix + name)
    mean = state_dict.get(prefix + 'running_mean')
    if released and mean is not None:
        state_dict[prefix + 'running_mean'] = mean.flatten()  # from (G, d, 1)
    if 'running_wm' in released or 'AR.running_scale' in released:
        state_dict.setdefault(prefix + 'num_batches_tracked', torch.tensor(1))
