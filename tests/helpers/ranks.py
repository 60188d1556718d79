"""Processes over gloo that stay, on which functions run; and what SyncCE must equal."""
import datetime
import io
import traceback

import torch
import torch.distributed as dist
from torch import multiprocessing

from cenet_mmdet.layers.reference import reference_ce


class Ranks:
    """Processes over gloo that start once and then run function after function.

    They are forks of a process that has imported the libraries, which takes seconds.

    Args:
        count: number of processes.
        folder: where they meet.
    """

    def __init__(self, count, folder):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['cenet_mmdet'])
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(folder), theirs),
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
    return cls(channels, dtype=dtype, **options)


def batches(shapes, channels, seed, scale=1.):
    """The batch of each rank, another offset in each; `shapes` are (samples, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * (torch.randn(n, channels, height, width, generator=generator,
                                 dtype=torch.float64) + rank)
            for rank, (n, height, width) in enumerate(shapes)]


def reference_step(ce, xs):
    """`reference_ce`, and what a training step does to the running averages."""
    outputs, statistics = reference_ce(ce, xs)
    with torch.no_grad():
        for name, value in statistics.items():
            running = getattr(ce, f'running_{name}', None)
            if running is not None:
                running.lerp_(value.view(running.shape), ce.momentum)
        ce.num_batches_tracked += 1
    return outputs
