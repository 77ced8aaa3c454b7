import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ._class_pool import ClassPool, pool_of


_EXPECTED = (
    "The file of `omniglot` is an .npz with an array `X` of uint8, (classes, drawings, "
    "height, width), such as (1623, 20, 28, 28) for all of Omniglot."
)


def omniglot(path: str | os.PathLike[str]) -> ClassPool:
    """Handwritten characters of 50 alphabets, 20 drawings of each, from a file.

    Lake et al., *Human-level concept learning through probabilistic program
    induction*, Science 350 (2015). Papers hold out classes: 1200 of 1623 to learn from.

    **Arguments:**

    - `path`: of an .npz file with an array `X` of uint8, `(classes, drawings, height,
        width)`, such as `(1623, 20, 28, 28)`; other arrays in it are not read.

    **Returns:**

    A pool of `(height, width)`, float32: `X` divided by 255.

    **Raises:**

    `FileNotFoundError` if there is no such file, `ValueError` if it is another one.

    !!! example

        ```python
        train, test = split_classes(key, omniglot("omniglot28.npz"), 1200)
        tasks = sample_episodes(key, 32, train, ways=5, shots=1, queries=15)
        ```
    """
    images = _read(Path(path))
    classes, drawings = images.shape[:2]
    pixels = images.reshape(-1, *images.shape[2:]).astype(np.float32) / 255
    return pool_of(pixels, np.full(classes, drawings))


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {_EXPECTED}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file. {_EXPECTED}")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "X" not in file.files:
                held = ", ".join(file.files) or "nothing"
                raise ValueError(f"it holds {held}, and no `X`")
            images = file["X"]
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}. {_EXPECTED}") from error
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(
            f"`X` in {path} is {images.dtype} of shape {images.shape}. {_EXPECTED}"
        )
    return images
