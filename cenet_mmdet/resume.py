"""Interrupted training that, resumed, ends as if it had not been interrupted."""
from functools import partial

import numpy as np
from mmengine.dataset.utils import worker_init_fn
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import set_random_seed


class ForeignCheckpointError(ValueError):
    """A run was to be resumed from the checkpoint of another model."""


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed run repeat what an uninterrupted one does, to the bit on a CPU.

    MMEngine restores weights, optimizer and schedules, but no random number
    generators. This hook seeds them at the start of each epoch from the run's
    seed, the epoch and the rank, those of the data workers too. It serves
    training by epochs with a checkpoint at the end of an epoch.

    Raises:
        ValueError: if data workers outlive the epoch, for they cannot be seeded.
        ForeignCheckpointError: on resuming from weights of other names or shapes.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if runner.cfg.get('resume'):
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            _compare(checkpoint['state_dict'], model.state_dict())

    def before_train(self, runner) -> None:
        loader = runner.train_dataloader
        if loader.persistent_workers:
            raise ValueError('ExactResumeHook needs data workers that start anew with each epoch: '
                             'set train_dataloader=dict(persistent_workers=False)')
        # MMEngine restores the seed after the sampler was built, and may add the rank to it.
        seed = [runner.seed]
        broadcast_object_list(seed)
        self.seed = loader.sampler.seed = seed[0]

    def before_train_epoch(self, runner) -> None:
        rank, loader = get_rank(), runner.train_dataloader
        sequence = np.random.SeedSequence((self.seed, runner.epoch, rank))
        seed = int(sequence.generate_state(1)[0]) // 2  # leaves room for the worker's number
        set_random_seed(seed)
        loader.worker_init_fn = partial(
            worker_init_fn, num_workers=loader.num_workers, rank=rank, seed=seed)


def _compare(loaded: dict, expected: dict) -> None:
    """Refuse weights that differ in names or shapes; the error names the first difference."""
    for name in [*expected, *loaded]:
        ours, theirs = (tuple(state[name].shape) if name in state else 'missing'
                        for state in (expected, loaded))
        if ours != theirs:
            raise ForeignCheckpointError(
                f'cannot resume: the checkpoint is of another model. {name} is {theirs} in the '
                f"checkpoint and {ours} in the config's model. To start a new run from these "
                'weights, pass --cfg-options load_from=FILE instead of --resume.')
