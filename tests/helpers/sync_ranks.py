"""Processes that stay, so that SyncCE can be tried on many batches; and what it must equal."""
import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cenet_mmdet import SyncCE
from cenet_mmdet.layers.reference import reference_ce


class Ranks:
    """Processes over gloo, each with a layer of its own for every batch that it is sent.

    Args:
        count: number of processes.
        folder: where they meet.
    """

    def __init__(self, count, folder):
        context = mp.get_context('spawn')
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(folder), theirs),
                                      daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()

    def train(self, **request):
        """One step of every rank: output, gradient of half its squared norm, buffers."""
        for pipe in self.pipes:
            pipe.send(request)
        return [pipe.recv() for pipe in self.pipes]

    @staticmethod
    def inputs(channels, shapes, scale, seed, options):
        """The batch of each rank, another offset in each."""
        generator = torch.Generator().manual_seed(seed)
        return [scale * (torch.randn(n, channels, height, width, generator=generator,
                                     dtype=torch.float64) + rank)
                for rank, (n, height, width) in enumerate(shapes)]

    @staticmethod
    def layer(cls, channels, options):
        torch.manual_seed(0)
        return cls(channels, dtype=torch.float64, **options)


def _serve(rank, count, folder, pipe):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank,
                            world_size=count, timeout=datetime.timedelta(seconds=60))
    for request in iter(pipe.recv, None):
        pipe.send(_step(rank, **request))
    dist.destroy_process_group()


def _step(rank, bad, channels, options, **batch):
    x = Ranks.inputs(channels, options=options, **batch)[rank]
    ce = Ranks.layer(SyncCE, channels, options)
    if bad is not None:
        spoilt = x.clone()
        if rank == bad:
            spoilt[0, 0, 0, 0] = float('nan')
        ce(spoilt)
    x.requires_grad_()
    y = ce(x)
    y.backward(y.detach())
    # As arrays: a tensor would be sent as a file that both sides hold open.
    return dict(output=y.detach().numpy(), gradient=x.grad.numpy(),
                buffers={name: buffer.numpy() for name, buffer in ce.named_buffers()})


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
