import equinox as eqx
from jaxtyping import PyTree


class Task(eqx.Module):
    """What to learn from and what to be judged by; many at once on a leading axis.

    - `support`: what the inner loop sees, whatever the loss takes, such as `(x, y)`.
    - `query`: what the adapted model is judged by.

    !!! example

        ```python
        task = Task(support=(x[:5], y[:5]), query=(x[5:], y[5:]))
        ```
    """

    support: PyTree
    query: PyTree
