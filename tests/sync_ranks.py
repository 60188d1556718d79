"""SyncCE on processes that stay, so that many batches can be tried; and what it must equal."""
import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cenet_mmdet import SyncCE


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
    if rank == bad:
        x[0, 0, 0, 0] = float('nan')
    x.requires_grad_()
    ce = Ranks.layer(SyncCE, channels, options)
    y = ce(x)
    y.backward(y.detach())
    # As arrays: a tensor would be sent as a file that both sides hold open.
    return dict(output=y.detach().numpy(), gradient=x.grad.numpy(),
                buffers={name: buffer.numpy() for name, buffer in ce.named_buffers()})


def reference_forward(ce, xs):
    """CE's definition over samples of any sizes, written out."""
    samples = [x[n:n + 1] for x in xs for n in range(len(x))]
    pixels = torch.cat([s.flatten(2)[0] for s in samples], 1)  # (C, all pixels)
    whitening = scale = None
    with torch.no_grad():
        ce.num_batches_tracked += 1
    if ce.has_bd:
        grouped = pixels.view(ce.num_groups, ce.group_size, -1)
        mean = grouped.mean(-1, keepdim=True)
        sigma = (grouped - mean) @ (grouped - mean).mT / grouped.shape[-1]
        sigma = sigma + ce.eps * torch.eye(ce.group_size, dtype=sigma.dtype)
        sigma_n = sigma / sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        whitening = torch.eye(ce.group_size, dtype=sigma.dtype).expand_as(sigma)
        for _ in range(ce.num_iters):
            whitening = 1.5 * whitening - 0.5 * whitening @ whitening @ whitening @ sigma_n
        with torch.no_grad():
            ce.running_mean += ce.momentum * (mean.flatten() - ce.running_mean)
            ce.running_whitening += ce.momentum * (whitening - ce.running_whitening)
    if ce.has_ir:
        varied = [s.flatten(2).var(-1) for s in samples if s[0, 0].numel() > 1]
        # Single pixels have no variance: s is then the running one. It is at least sqrt(eps).
        scale = (torch.cat(varied).mean().clamp(min=ce.eps).sqrt() if varied
                 else ce.running_scale.clone())
        with torch.no_grad():
            ce.running_scale += ce.momentum * (scale - ce.running_scale)
    ratio = torch.sigmoid(ce.lambda_logit) if ce.bd_ratio is None else ce.bd_ratio
    outputs = []
    for x in xs:
        flat = x.flatten(2)
        y = 0
        if ce.has_bd:
            grouped = flat.unflatten(1, (ce.num_groups, ce.group_size))
            y = y + ratio * (whitening @ grouped).view_as(flat)
        if ce.has_ir:
            single = flat.shape[-1] == 1
            variance = torch.zeros_like(flat[..., 0]) if single else flat.var(-1)
            y = y + (1 - ratio) * (ce.reweighting(variance) / scale).unsqueeze(-1) * flat
        outputs.append(y.view_as(x))
    return outputs
