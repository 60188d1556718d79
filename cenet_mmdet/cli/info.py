"""What CE layers a checkpoint holds."""
import sys
from typing import Dict, List

HEADER = ('layer', 'channels', 'group', 'lambda', 'branches', 'statistics (batches)', 'not finite')

# What only a CE layer has, so that one is found under any name: `layer1.0.ce`, `bn1.ce`, `2`.
SIGNS = ('lambda_logit', 'reweighting.0.weight')


def run(arguments) -> int:
    """Print a table of the checkpoint's CE layers, or that it has none."""
    try:
        from ..checkpoint.convert import CheckpointError, to_ours
        from ..checkpoint.load import load_tensors
    except ImportError as error:
        sys.exit(f'info needs torch ({error}). `cenet-mmdet doctor` says how to install it.')
    try:
        entries = load_tensors(arguments.checkpoint)
    except CheckpointError as error:
        sys.exit(str(error))

    ours = to_ours(entries)
    layers = ce_layers(ours)
    print(f'{arguments.checkpoint}: {kind(entries)}; entries: {len(entries)}, '
          f'values: {sum(value.numel() for value in entries.values()):,}')
    if layers:
        print(f'CE layers: {len(layers)}\n')
        print(table([HEADER, *(row(name, layer) for name, layer in layers.items())]))
        unset = [name for name, layer in layers.items() if statistics(layer) == 'not set']
        if unset:
            print(f'\nThe statistics of {len(unset)} layers were neither trained nor loaded; a CE '
                  "layer with freeze='all' refuses to run on them.")
    else:
        print('It holds no CE layers.')
    _print_non_finite(ours, layers)
    return 0


def kind(entries: Dict) -> str:
    """What the file is of, as far as the names in it tell."""
    from ..checkpoint.convert import BLOCK, source_of

    source = source_of(entries)
    if 'ResNet' in source and not any(map(BLOCK.match, entries)):
        return 'a network other than ResNet'
    return source


def ce_layers(entries: Dict) -> Dict[str, Dict]:
    """The entries of each CE layer by the layer's name; both under our names."""
    from ..checkpoint.convert import CE_ENTRY

    prefixes = []
    for key in entries:
        match = CE_ENTRY.match(key)
        # one of BD alone has nothing that other whitening layers have not: its name tells
        if match and key == f'{match.group()}running_whitening':
            prefixes.append(match.group())
        prefixes += [key[:-len(sign)] for sign in SIGNS if f'.{key}'.endswith(f'.{sign}')]
    return {prefix.rstrip('.'): {key[len(prefix):]: value for key, value in entries.items()
                                 if key.startswith(prefix)}
            for prefix in dict.fromkeys(prefixes)}


def row(name: str, layer: Dict) -> List[str]:
    """A layer's line of the table."""
    has_bd, has_ir = 'running_whitening' in layer, 'reweighting.0.weight' in layer
    sizes = [len(layer[key]) for key in ('running_mean', 'reweighting.3.weight') if key in layer]
    return [name or '(the file itself)', *(sizes[:1] or '?'),
            layer['running_whitening'].shape[-1] if has_bd else '-',
            ratio(layer, has_bd, has_ir),
            ' + '.join(['BD'] * has_bd + ['IR'] * has_ir) or '?',
            statistics(layer), non_finite(layer.values()) or '-']


def ratio(layer: Dict, has_bd: bool, has_ir: bool) -> str:
    """lambda, as it was learned or is fixed."""
    if 'lambda_logit' in layer:
        return f'{layer["lambda_logit"].float().sigmoid().item():.4f}'
    return 'fixed' if has_bd and has_ir else f'{int(has_bd)} (fixed)'


def statistics(layer: Dict) -> str:
    """Whether the running statistics were trained or loaded, and over how many batches."""
    count = layer.get('num_batches_tracked')  # 1 in the authors' files, which have none
    if count is None:
        return 'not counted'
    return f'set ({count.item()})' if count else 'not set'


def non_finite(values) -> int:
    """How many numbers of the tensors are NaN or infinite."""
    return sum(value.numel() - int(value.double().isfinite().sum())
               for value in values if value.is_floating_point())


def _print_non_finite(entries: Dict, layers: Dict) -> None:
    bad = {key: non_finite([value]) for key, value in entries.items()}
    bad = {key: count for key, count in bad.items() if count}
    if bad:
        print('\nEntries with NaN or infinite values:')
        print(table([[f'  {key}', f'{count} of {entries[key].numel()}']
                     for key, count in bad.items()]))


def table(rows) -> str:
    """Rows of equal length as lines with aligned columns."""
    columns = zip(*([str(cell) for cell in row] for row in rows))
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return '\n'.join('  '.join(cells).rstrip() for cells in zip(*padded))
