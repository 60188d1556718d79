"""Files and folders that are written whole or not at all."""
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union

PathLike = Union[str, os.PathLike]


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A path to write a file or a new folder to, which takes the place of `path` at the end.

    It has the same suffix. After an exception it is deleted, and `path` stays as it was.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}.partial{path.suffix}')
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
