#!/usr/bin/env python3
"""Test and measure on a GPU, into one file that can be put into the documents.

    python tools/dev/gpu_report.py build/gpu_report.md

Runs the tests of tests/devices on CUDA and the tables of tools/benchmark.py: layers in float32,
bfloat16 and channels_last, and a training step and an evaluation of Mask R-CNN. Without a GPU it
says so and does nothing.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARK = 'tools/benchmark.py'
CONFIGS = [f'configs/mask_rcnn_{name}.py' for name in ('r50', 'ce_r50', 'syncce_r50')]
COMMANDS = {
    'Tests': ('-m', 'pytest', '-q', 'tests/devices', '-k', 'cuda', '--durations=0'),
    'Operations': (BENCHMARK, 'operations'),
    'Layers, float32': (BENCHMARK, 'layers', '--device', 'cuda'),
    'Layers, bfloat16': (BENCHMARK, 'layers', '--device', 'cuda', '--dtype', 'bfloat16'),
    'Layers, bfloat16, channels_last': (BENCHMARK, 'layers', '--device', 'cuda', '--dtype',
                                        'bfloat16', '--channels-last'),
    'Mask R-CNN, training step': (BENCHMARK, 'models', *CONFIGS, '--device', 'cuda'),
    'Mask R-CNN, evaluation': (BENCHMARK, 'inference', *CONFIGS[:2], '--device', 'cuda'),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='the file to write')
    return parser.parse_args()


def main(arguments):
    import torch

    if not torch.cuda.is_available():
        print('no GPU here: nothing was tested or measured')
        return
    sections = [f'# On {torch.cuda.get_device_name(0)}\n\ntorch {torch.__version__}, CUDA '
                f'{torch.version.cuda}, {torch.cuda.device_count()} GPU\n']
    failed = []
    for title, command in COMMANDS.items():
        print(title, flush=True)
        result = subprocess.run([sys.executable, *command], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        failed += [title] * (result.returncode != 0)
        sections.append(f'## {title}\n\n`python {" ".join(command)}`\n\n```\n'
                        f'{result.stdout.strip()}\n```\n')
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text('\n'.join(sections))
    print(f'written: {arguments.out}')
    if failed:
        sys.exit(f'these failed: {", ".join(failed)}')


if __name__ == '__main__':
    main(parse_args())
