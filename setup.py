import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / 'cenet_mmdet'


def read(path):
    return path.read_text(encoding='utf-8')


def add_resources(package):
    """Put configs and tools into a package that is built, where OpenMMLab's packages have them.

    The source tree stays as it is: in a checkout, cenet_mmdet/utils/resources.py finds them there.
    """
    inside = PACKAGE / '.mim'  # in an unpacked sdist
    source = inside if inside.is_dir() else ROOT
    target = Path(package).resolve() / '.mim'
    if target == inside:  # --build-lib .
        return
    shutil.rmtree(target, ignore_errors=True)  # of an earlier build
    for folder in ('configs', 'tools'):
        shutil.copytree(source / folder, target / folder,
                        ignore=shutil.ignore_patterns('__pycache__', '*.py[cod]', '.*'))
    shutil.copy(source / 'model-index.yml', target)


class BuildPy(build_py):

    def run(self):
        super().run()
        add_resources(Path(self.build_lib) / 'cenet_mmdet')


class Sdist(sdist):

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        add_resources(Path(base_dir) / 'cenet_mmdet')


setup(
    name='cenet-mmdet',
    version=re.search("__version__ = '(.+)'", read(PACKAGE / '__init__.py')).group(1),
    description='Channel Equilibrium networks (ICML 2020) for MMDetection',
    long_description=read(ROOT / 'README.md'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=['object detection', 'instance segmentation', 'normalization', 'MMDetection',
              'OpenMMLab'],
    project_urls={
        'Paper': 'https://arxiv.org/abs/2003.00214',
        "Authors' code": 'https://github.com/Tangshitao/CENet',
    },
    packages=find_packages(include=['cenet_mmdet', 'cenet_mmdet.*']),
    package_data={'cenet_mmdet': ['py.typed']},
    cmdclass={'build_py': BuildPy, 'sdist': Sdist},
    entry_points={'console_scripts': ['cenet-mmdet=cenet_mmdet.cli:main']},
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
        'dev': ['matplotlib', 'pycocotools', 'rich', 'hypothesis>=6.100',
                'mypy==2.4.1; python_version >= "3.10"', 'onnx', 'onnxruntime', 'onnxscript',
                'pre-commit>=3.5', 'psutil', 'pytest>=8', 'pytest-xdist>=3.6', 'ruff==0.17.6'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
)
