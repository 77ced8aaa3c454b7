import numpy as np

from ...internal import require_extra
from ._class_pool import ClassPool


def digits() -> ClassPool:
    """The handwritten digits that come with scikit-learn: 1797 images, 10 classes.

    Ten classes are too few to hold out classes: split them by `split_examples`.

    **Returns:**

    A pool of `(64,)`, 8 by 8 pixels in [0, 1]; a class has 174 or more.

    **Raises:**

    `ImportError` with the install command if scikit-learn is not installed.

    !!! example

        ```python
        train, test = split_examples(key, digits(), 100)
        tasks = sample_episodes(key, 8, train, ways=5, shots=1, queries=15)
        ```
    """
    x, labels = require_extra("sklearn.datasets", "meta").load_digits(return_X_y=True)
    return ClassPool.init((x / 16).astype(np.float32), labels)
