"""State space layers of the contract suite, as small as they can be."""

from functools import partial
from typing import Any

from support.layer_case import Case

from capibara_eqx.layers import S4, S4D, S5, LinearSSM, Mamba2, Mamba3


# An exponential of a matrix takes long to compile: it is left to the slow tests.
_linear_ssm = partial(
    LinearSSM, 3, 2, 4, 2, dropout_rate=0.0, discretization="bilinear"
)
_linear_ssm_legt = partial(
    LinearSSM,
    3,
    3,
    2,
    conv_dim=1,
    dropout_rate=0.0,
    measure="legt",
    implementation="reference",
)
_s5 = partial(S5, 3, 4, blocks=2)
_s5_bilinear = partial(
    S5,
    2,
    2,
    discretization="bilinear",
    clip_eigenvalues=True,
    C_init="complex_normal",
    implementation="reference",
)

_STATE_SPACE: dict[str, Any] = {
    "dt_min": 0.1,
    "dt_max": 0.5,
    "mode": "chunked",
    "chunk_size": 4,
}
_LIMITED: dict[str, Any] = {"dt_limit": (0.01, 0.2), "chunk_size": 4}

STATE_SPACES = (
    # Those of a full matrix and of one for all channels have loops of their own, too.
    Case("linear_ssm", _linear_ssm, 3, 40, slow=True),
    Case("s5", _s5, 3, 40, slow=True),
    Case("s4d", partial(S4D, 3, 4, **_STATE_SPACE), 3, 60),
    Case("mamba3", partial(Mamba3, 3, 4, head_dim=3, chunk_size=3), 3, 60),
    Case("mamba2", partial(Mamba2, 4, 3, 3, head_dim=4, **_LIMITED), 4, 60),
    Case(
        "s4",
        partial(S4, 2, 4, **{**_STATE_SPACE, "chunk_size": 2}),
        width=2,
        terms=100,
        slow=True,
    ),
    Case("linear_ssm_legt", _linear_ssm_legt, 3, 20, slow=True),
    Case("s5_bilinear", _s5_bilinear, 2, 20, slow=True),
    Case(
        "s4d_convolution",
        partial(S4D, 3, 2, "inv", dt_min=0.1, chunk_size=2),
        width=3,
        terms=60,
        exact=False,
        slow=True,
    ),
    Case(
        "s4d_recurrent",
        partial(S4D, 2, 6, "legs", "bilinear", 0.1, 0.5, mode="recurrent"),
        width=2,
        terms=60,
        slow=True,
    ),
    Case(
        "s4_convolution",
        partial(S4, 2, 4, "legt", 0.1, chunk_size=2),
        width=2,
        terms=100,
        exact=False,
        slow=True,
    ),
    Case(
        "s4_recurrent",
        partial(S4, 2, 2, dt_min=0.1, mode="recurrent"),
        2,
        60,
        slow=True,
    ),
    Case(
        "mamba3_norm",
        partial(Mamba3, 4, 5, 2, 2, 2, 1.0, output_norm=True, implementation="xla"),
        width=4,
        terms=60,
        slow=True,
    ),
    Case(
        "mamba2_groups",
        partial(Mamba2, 4, 2, 2, head_dim=2, n_groups=2, norm_before_gate=True),
        width=4,
        terms=40,
        slow=True,
    ),
)
