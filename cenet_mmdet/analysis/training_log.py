"""What `ChannelHealthHook` logged in a training run."""
import json
from pathlib import Path
from typing import Dict, List, Tuple

from ..utils.errors import InputError

# {'inhibited', 'correlation' or 'lambda': {stage: [(iteration, value), ...]}}
Curves = Dict[str, Dict[str, List[Tuple[int, float]]]]


def read_curves(run: Path) -> Curves:
    """The hook's measurements over a run, which may have been resumed, from its work dir.

    Raises:
        InputError: the folder has no JSON log, or the hook logged nothing.
    """
    records = []
    for log in sorted([*run.glob('vis_data/scalars.json'), *run.glob('*/vis_data/scalars.json')]):
        text = log.read_text()
        whole = text[:text.rfind('\n') + 1]  # a run that goes on may be writing the last line
        new = [json.loads(line) for line in whole.splitlines() if '"inhibited/' in line]
        # A resumed run repeats the iterations after its last checkpoint.
        records = [old for old in records if not new or old['step'] < new[0]['step']] + new
    if not records:
        raise InputError(f'{run} has no measurements of channels in */vis_data/scalars.json; give '
                         "the work dir of a run with custom_hooks=[dict(type='ChannelHealthHook')]")
    curves = {'inhibited': {}, 'correlation': {}, 'lambda': {}}
    for record in records:
        for key, value in record.items():
            kind, _, stage = key.partition('/')
            if kind in curves:
                curves[kind].setdefault(stage, []).append((record['step'], value))
    return curves
