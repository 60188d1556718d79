"""`python -m cenet_mmdet`, where the command cenet-mmdet is not on the PATH."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
