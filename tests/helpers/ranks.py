"""Processes over gloo that stay, on which functions run; and what SyncCE must equal."""
import datetime
import io
import traceback

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cenet_mmdet.layers.reference import reference_ce
from helpers.layers import strengthened

# New processes are forks of one that has imported the libraries, which takes seconds.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['cenet_mmdet'])


class Ranks:
    """Processes over gloo that meet in a folder, start once, and run function after function."""

    def __init__(self, count, folder):
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, count, str(folder), theirs),
                                    daemon=True)
            process.start()
            theirs.close()  # so that a rank that dies ends the wait for its answer
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()

    def run(self, function, *arguments):
        """`function(rank, *arguments)` of every rank: tensors in plain containers."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=True)
                   for pipe in self.pipes]
        for error, _ in answers:
            assert error is None, error
        return [answer for _, answer in answers]


def _serve(rank, count, folder, pipe):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
                            world_size=count, timeout=datetime.timedelta(seconds=120))
    for function, arguments in iter(pipe.recv, None):
        try:
            answer = None, function(rank, *arguments)
        except Exception:
            answer = traceback.format_exc(), None
        # As bytes: the pipe would send a tensor as a file that both sides hold open.
        content = io.BytesIO()
        torch.save(answer, content)
        pipe.send_bytes(content.getvalue())
    dist.destroy_process_group()


def new_layer(cls, channels, dtype=torch.float64, **options):
    """With the same parameters every time."""
    torch.manual_seed(0)
    layer = strengthened(cls(channels, dtype=dtype, **options))
    if hasattr(layer, 'reweighting'):
        # else the ReLU of a single hidden unit stands at 0, where rounding decides its gradient
        nn.init.constant_(layer.reweighting[1].bias, 0.1)
    return layer


def batches(shapes, channels, seed, scale=1.):
    """The batch of each rank, another offset in each; `shapes` are (samples, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * (torch.randn(n, channels, height, width, generator=generator,
                                 dtype=torch.float64) + rank)
            for rank, (n, height, width) in enumerate(shapes)]


class Collectives(TorchDispatchMode):
    """Counts those inside a `with` statement."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == 'c10d'
        return function(*args, **(kwargs or {}))


def reference_step(ce, xs):
    """`reference_ce`, and what a training step does to the running averages."""
    outputs, statistics = reference_ce(ce, xs)
    with torch.no_grad():
        for name, value in statistics.items():
            running = getattr(ce, f'running_{name}', None)
            if running is not None and value is not running:
                running.lerp_(value.view(running.shape), ce.momentum)
        ce.num_batches_tracked += 1
    return outputs


def reference_norm(norm, xs):
    """Batch norm by itself over maps of any sizes: over all their pixels in one row."""
    pixels = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    rows = norm(pixels.T[:, :, None, None])[:, :, 0, 0].T
    parts = rows.split([x[:, 0].numel() for x in xs], 1)
    return [p.view(len(p), len(x), *x.shape[2:]).transpose(0, 1) for p, x in zip(parts, xs)]
