"""Shows what CE layers a checkpoint holds."""
import re
from argparse import Namespace
from typing import Dict, List

from ..utils.errors import InputError, first_line

ROW = '{:28} {:>8}  {:>10}  {:>9}  {:8}  {}'
HEADER = ('layer', 'channels', 'group size', 'lambda', 'branches', 'statistics')
# A CE layer with IR is known by its entries, whatever its name. BD alone has the entries of
# IterNorm, so the layer's name has to be `ce`.
CE_LAYER = re.compile(r'(.*\.|)reweighting\.3\.weight|((?:.*\.|)ce1?\.)running_whitening')


def run(arguments: Namespace) -> int:
    """Show the CE layers of a checkpoint, and its entries with inf or NaN.

    Code that the file may hold is not run.

        cenet-mmdet info work_dirs/mask_rcnn_ce_r50/epoch_24.pth
    """
    try:
        from ..checkpoint.convert import CheckpointError, named_tensors, to_ours
        from ..checkpoint.load import load
    except Exception as error:  # a broken torch raises more than ImportError
        raise InputError(f'info needs torch ({first_line(error)}). `cenet-mmdet doctor` shows how '
                         'to install it.') from error
    checkpoint = load(arguments.checkpoint)
    try:
        entries = to_ours(named_tensors(checkpoint))
    except CheckpointError as error:
        raise InputError(f'no weights in {arguments.checkpoint}: {error}') from None
    matches = filter(None, map(CE_LAYER.fullmatch, entries))
    prefixes = dict.fromkeys(match[1] or match[2] or '' for match in matches)
    print(f'{arguments.checkpoint}: {len(entries)} entries, {len(prefixes)} CE layers\n')
    for row in [HEADER, *(_row(prefix, entries) for prefix in prefixes)] if prefixes else ():
        print(ROW.format(*row))
    for name, value in entries.items():
        if count := int((~value.double().isfinite()).sum()):
            print(f'inf or NaN: {name}, {count} of {value.numel()} values')
    return 0


def _row(prefix: str, entries: Dict) -> List:
    names = 'running_whitening', 'reweighting.3.weight', 'lambda_logit', 'num_batches_tracked'
    whitening, linear, logit, batches = (entries.get(prefix + name) for name in names)
    has_bd, has_ir = whitening is not None, linear is not None
    fixed = 'fixed' if has_bd and has_ir else f'{int(has_bd)} (fixed)'
    return [prefix.rstrip('.'), len(linear) if has_ir else whitening.shape[:2].numel(),
            whitening.shape[-1] if has_bd else '-',
            fixed if logit is None else f'{logit.double().sigmoid().item():.4f}',
            ' + '.join(['BD'] * has_bd + ['IR'] * has_ir), 'set' if batches else 'not set']
