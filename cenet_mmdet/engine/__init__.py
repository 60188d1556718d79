"""What takes part in MMEngine's runs: hooks, distributed training on CPUs, checks before a run."""
from .channel_health_hook import ChannelHealthHook
from .data_check_hook import DataCheckHook
from .exact_resume_hook import ExactResumeHook

__all__ = ['ChannelHealthHook', 'DataCheckHook', 'ExactResumeHook']
