# MMDetection's runtime, and runs that can be interrupted without leaving a trace.
_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['cenet_mmdet'])
custom_hooks = [dict(type='ExactResumeHook'), dict(type='DataCheckHook')]
