"""Interrupted training that, resumed, ends as if it had not been interrupted."""
from functools import partial
from typing import Any, Dict

import numpy as np
from mmengine.dataset.utils import worker_init_fn
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import set_random_seed

from ..checkpoint.convert import CheckpointError, first_difference


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed run repeat what an uninterrupted one does, to the bit on a CPU.

    MMEngine restores no random number generators. This hook seeds them, also in the data workers,
    at the start of each epoch, from the run's seed, the epoch and the rank. It serves training by
    epochs with a checkpoint at the end of an epoch.

    Raises:
        ValueError: data workers outlive the epoch, so they cannot be seeded.
        CheckpointError: a run is resumed from weights of other names or shapes.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict) -> None:
        if runner.cfg.get('resume'):
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            difference = first_difference(model.state_dict(), checkpoint['state_dict'])
            if difference:
                raise CheckpointError(
                    f'cannot resume from the checkpoint of another model: {difference}. To start '
                    'a new run from its weights, pass --cfg-options load_from=FILE instead of '
                    '--resume.')

    def before_train(self, runner: Any) -> None:
        loader = runner.train_dataloader
        if loader.persistent_workers:
            raise ValueError('ExactResumeHook needs data workers that start anew with each epoch: '
                             'set train_dataloader=dict(persistent_workers=False)')
        # MMEngine restores the seed after the sampler was built, and may add the rank to it.
        seed = [runner.seed]
        broadcast_object_list(seed)
        self.seed = loader.sampler.seed = seed[0]

    def before_train_epoch(self, runner: Any) -> None:
        rank, loader = get_rank(), runner.train_dataloader
        sequence = np.random.SeedSequence((self.seed, runner.epoch, rank))
        seed = int(sequence.generate_state(1)[0]) // 2  # leaves room for the worker's number
        set_random_seed(seed)
        loader.worker_init_fn = partial(
            worker_init_fn, num_workers=loader.num_workers, rank=rank, seed=seed)
