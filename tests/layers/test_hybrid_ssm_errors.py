"""What the hybrid layer refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused
from support.quick import filled
from support.small_layers import hybrid

from capibara_eqx.layers import Conv1DBlock, HybridCache, HybridSSM, Mamba, RMSNorm


KEY = jax.random.key(0)
IDS = jnp.asarray([-1, 3, 3, 8, 8, 8, 3, -1], "int32")


@functools.cache
def layer_of(mode):
    return filled(hybrid, seed=0, size=0.5, mode=mode, ssm_threshold=5)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


BAD = [
    ({"d_model": 0}, ["`d_model`", "positive integer"]),
    ({"ssm_threshold": 0}, ["`ssm_threshold`", "positive integer"]),
    ({"mode": "mixed"}, ["`mode`", "'switch', 'mix'", "Did you mean 'mix'"]),
    ({"use_mamba": False, "use_transformer": False}, ["both False", "Set one"]),
    ({"n_heads": 3}, ["`n_heads`", "d_model=4"]),
]


@pytest.mark.errors
@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_arguments(options, words):
    with refused(*words):
        HybridSSM(**({"d_model": 4} | options), key=KEY)


@pytest.mark.errors
def test_arguments_without_an_effect():
    conv: Any = Conv1DBlock(4, 4, 2, key=KEY)
    with refused("`ssm`", "`use_mamba` is False"):
        HybridSSM(4, use_mamba=False, ssm=conv, key=KEY)
    with refused("`attention`", "`use_transformer` is False"):
        HybridSSM(4, use_transformer=False, attention=conv, key=KEY)
    with refused("`n_heads`", "Leave it out"):
        HybridSSM(4, n_heads=2, attention=conv, key=KEY)
    with refused("`n_heads`", "Leave it out"):
        HybridSSM(4, n_heads=2, use_transformer=False, key=KEY)
    for flag in ("use_mamba", "use_transformer"):
        alone: Any = {flag: False}
        with refused('`mode="mix"`', "two branches", f"`{flag}`", "leave out `mode`"):
            HybridSSM(4, mode="mix", **alone, key=KEY)


@pytest.mark.errors
def test_a_switch_needs_to_know_its_branch():
    layer, x = layer_of("switch"), random((8, 4))
    with refused("length of a row", "`segment_ids`", "branch", 'mode="mix"'):
        layer(x, segment_ids=IDS)
    with refused("`max_len` is needed", "number of tokens", "`branch`"):
        layer.init_cache()
    for branch in ("mamba", "transformer"):
        bad: Any = branch
        with refused("`branch`", "'ssm', 'attention'"):
            layer(x, branch=bad)
        with refused("`branch`", "'ssm', 'attention'"):
            layer.init_cache(branch=bad)


@pytest.mark.errors
def test_a_branch_that_cannot_be_chosen():
    mix, x = layer_of("mix"), random((8, 4))
    with refused("`branch`", 'mode="mix"'):
        mix(x, branch="ssm")
    with refused("`branch`", 'mode="mix"'):
        mix.init_cache(max_len=8, branch="ssm")
    with refused('mode="mix"', "both branches"):
        mix.select_branch(3)
    alone = filled(hybrid, seed=0, size=0.5, use_mamba=False)
    with refused("`branch`", "'ssm'", "built without"):
        alone(x, branch="ssm")


@pytest.mark.errors
def test_caches_of_other_layers():
    switch, mix, x = layer_of("switch"), layer_of("mix"), random((2, 4))
    alone = filled(hybrid, seed=0, size=0.5, use_mamba=False)
    long = switch.init_cache(max_len=8)
    nothing: Any = HybridCache(None, None)
    foreign: Any = switch.ssm.init_cache()
    with refused("HybridCache", "MambaCache", "`init_cache`"):
        switch.prefill(x, foreign)
    for layer, cache in ((mix, long), (alone, long), (switch, nothing)):
        with refused("`cache`", "other branches", "`init_cache`"):
            layer.prefill(x, cache)
        with refused("`cache`", "other branches", "`init_cache`"):
            layer.step(x[0], cache)
    with refused("`cache`", "['attention', 'ssm']"):
        switch.prefill(x, mix.init_cache(max_len=8))


class Reports(Conv1DBlock):
    def __init__(self):
        super().__init__(4, 4, 2, key=KEY)

    def __call__(self, x, **options):
        y: Any = super().__call__(x, **options)
        return y, None


@pytest.mark.errors
@pytest.mark.parametrize("mode", ["switch", "mix"])
def test_branches_that_do_not_fit(mode):
    def with_ssm(ssm):
        return HybridSSM(4, 1, mode=mode, ssm=ssm, n_heads=2, key=KEY)

    x = random((2, 4))
    with refused("`ssm`", "output alone", "tuple of 2"):
        with_ssm(Reports())(x)
    with refused("`ssm`", "(2, 4)", "(2, 3)"):
        with_ssm(Conv1DBlock(4, 3, 2, key=KEY))(x)


@pytest.mark.errors
@pytest.mark.parametrize("name", ["ssm", "attention"])
def test_branches_that_are_no_mixers_of_the_width(name):
    norm, narrow = RMSNorm(4), filled(Mamba, 3, 2, seed=0, size=0.5)
    for branch, words in (
        (norm, ["sequence mixer", "RMSNorm"]),
        (narrow, ["d_model=4", "Mamba of d_model=3"]),
    ):
        given_branch: Any = {name: branch}
        with refused(f"HybridSSM: `{name}`", *words):
            HybridSSM(4, **given_branch, key=KEY)


@pytest.mark.errors
def test_inputs_that_do_not_fit():
    layer = layer_of("mix")
    with refused("HybridSSM: `x`", "4 elements", "(2, 3)"):
        layer(random((2, 3)))
    with refused("HybridSSM.step: `x`", "4 elements", "(3,)"):
        layer.step(random((3,)), layer.init_cache(max_len=2))
    with refused("`segment_ids`", "(2,)", "(8,)"):
        layer(random((2, 4)), segment_ids=IDS)
