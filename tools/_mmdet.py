"""Runs MMDetection's own command line tools, after a look at what they will need."""
import argparse
import runpy
import sys
import textwrap
from pathlib import Path

import mmdet
from mmengine.config import Config, DictAction

from cenet_mmdet.checkpoints import CheckpointError
from cenet_mmdet.cpu import init_process_group, runs_on_cpu
from cenet_mmdet.preflight import missing_files


def load_config(path, options=None):
    """The config with `--cfg-options` merged, or an exit with one line."""
    if not Path(path).is_file():
        sys.exit(f'config not found: {path}. Give the path of a config file, for example '
                 f'{Path(__file__).resolve().parent.parent / "configs/mask_rcnn_ce_r50.py"}')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options or {})
    return cfg


def build_model(path):
    """The config's model with random weights, as it would train on one process."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    import cenet_mmdet.backbones  # noqa: F401

    cfg = load_config(path)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    cfg.model.backbone.init_cfg = None
    with MODELS.switch_scope_and_registry(None) as registry:
        model = revert_sync_batchnorm(registry.build(cfg.model))
    if hasattr(model.backbone, 'allow_unset'):
        model.backbone.allow_unset = True  # frozen CE layers refuse to run on unset statistics
    return model


def load_model(config, checkpoint):
    """The config's model with all its weights from the checkpoint, in evaluation mode."""
    from mmengine.runner.checkpoint import load_checkpoint

    if not Path(checkpoint).is_file():
        sys.exit(f'checkpoint not found: {checkpoint}')
    model = build_model(config)
    try:
        load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    except (CheckpointError, RuntimeError, KeyError) as error:
        sys.exit(f'{checkpoint} does not fit {config}: {textwrap.shorten(str(error), 500)}')
    model.eval()
    return model


def check_files(splits, positional=('config', )):
    """The command line's config, or an exit with a line for each missing file it names.

    Args:
        splits: which of train, val and test the tool uses.
        positional: names of the tool's leading arguments.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in positional:
        parser.add_argument(name)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    parser.add_argument('--resume', nargs='?', const='auto')
    parser.add_argument('--work-dir')
    arguments, _ = parser.parse_known_args()
    cfg = load_config(arguments.config, arguments.cfg_options)
    if 'checkpoint' in positional:
        cfg.load_from = arguments.checkpoint
    elif arguments.resume:
        cfg.resume = True
        cfg.load_from = None if arguments.resume == 'auto' else arguments.resume
        cfg.work_dir = (arguments.work_dir or cfg.get('work_dir')
                        or str(Path('work_dirs') / Path(arguments.config).stem))
    problems = missing_files(cfg, splits)
    if problems:
        sys.exit('\n'.join(problems))
    return cfg


def asks_for_help():
    return not sys.argv[1:] or {'-h', '--help'} & set(sys.argv[1:])


def run_tool(tool, doc):
    """Hand the command line to MMDetection's tool; its help follows ours."""
    path = Path(mmdet.__file__).parent / '.mim' / 'tools' / tool
    if not path.is_file():
        sys.exit(f'MMDetection is installed without its tools ({path} is missing). '
                 'Install it from a wheel or sdist: pip install onedl-mmdetection==3.5.1')
    if asks_for_help():
        print(doc)
    elif runs_on_cpu():
        _adapt_to_cpu()
    try:
        runpy.run_path(str(path), run_name='__main__')
    except CheckpointError as error:
        sys.exit(str(error))


def _adapt_to_cpu():
    """Change the command line into one under which MMEngine does the same on CPUs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--launcher')
    parser.add_argument('--amp', action='store_true')
    arguments, _ = parser.parse_known_args()
    if arguments.amp:
        sys.exit("--amp needs a GPU: MMCV's operators compute in float32 on CPUs. Leave it out.")
    if arguments.launcher == 'pytorch':
        init_process_group()
        _add_option('model_wrapper_cfg.type=CPUDistributedDataParallel')


def _add_option(option):
    """Put one more KEY=VALUE into the --cfg-options, of which argparse heeds the last list only."""
    for index, argument in enumerate(sys.argv):
        name, _, value = argument.partition('=')
        if len(name) > 2 and '--cfg-options'.startswith(name):
            sys.argv[index:index + 1] = ['--cfg-options', option, *([value] if value else [])]
            return
    sys.argv += ['--cfg-options', option]
