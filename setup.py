from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name='cenet-mmdet',
    version='0.1.0',
    description='Channel Equilibrium networks (ICML 2020) for MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['cenet_mmdet', 'cenet_mmdet.*']),
    python_requires='>=3.9',
    # torch, mmcv, mmengine and mmdet are deliberately not required: each exists
    # in several builds and under two distribution names, and asking for one
    # would make pip replace what the user's environment already has.
    install_requires=[],
    extras_require={
        # what tools/ need beyond MMDetection's own dependencies
        'tools': ['matplotlib', 'pycocotools', 'rich'],
        # classifiers; its own dependencies leave torch and mmcv alone as well
        'pretrain': ['onedl-mmpretrain>=1.3.6'],
        # tools/deploy.py --onnx
        'onnx': ['onnx', 'onnxruntime', 'onnxscript'],
        'dev': ['matplotlib', 'pycocotools', 'rich', 'hypothesis>=6.100', 'onnx', 'onnxruntime',
                'onnxscript', 'pre-commit>=3.5', 'psutil', 'pytest>=8',
                'pytest-xdist>=3.6', 'ruff==0.17.6'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
