"""State space layers of the contract suite, as small as they can be."""

from functools import partial

from capibara_eqx.layers import S5, LinearSSM


# An exponential of a matrix takes long to compile: it is left to the slow tests.
linear_ssm = partial(LinearSSM, 3, 2, 4, 2, dropout_rate=0.0, discretization="bilinear")
linear_ssm_legt = partial(
    LinearSSM,
    3,
    3,
    2,
    conv_dim=1,
    dropout_rate=0.0,
    measure="legt",
    implementation="reference",
)
s5 = partial(S5, 3, 4, blocks=2)
s5_bilinear = partial(
    S5,
    2,
    2,
    discretization="bilinear",
    clip_eigenvalues=True,
    C_init="complex_normal",
    implementation="reference",
)
