"""The oracles themselves, against SciPy, NumPy and closed forms."""

import numpy as np
import pytest
from scipy.signal import lfilter
from support import numpy_oracles as oracles
from support.finite_differences import directional_derivative
from support.tolerances import assert_close, assert_rounded, tolerance


def close(actual, expected, length=1):
    assert_close(actual, expected, dtype=np.float64, length=length)


def test_linear_recurrence_is_a_one_pole_filter():
    rng = np.random.default_rng(0)
    x, pole, start = rng.standard_normal(50), 0.83, 0.7
    want, final = lfilter([1.0], [1.0, -pole], x, zi=[pole * start])
    h, state = oracles.linear_recurrence(
        np.full((50, 1), pole), x[:, None], initial_state=np.array([start])
    )
    close(h[:, 0], want, 50)
    close(state, final / pole, 50)


def test_linear_recurrence_reversed_filters_the_reversed_signal():
    rng = np.random.default_rng(1)
    x, pole = rng.standard_normal(20) + 1j * rng.standard_normal(20), 0.6 + 0.5j
    want = lfilter([1.0], [1.0, -pole], x[::-1])[::-1]
    h, state = oracles.linear_recurrence(
        np.full((20, 1), pole), x[:, None], reverse=True
    )
    close(h[:, 0], want, 20)
    close(state[0], want[0], 20)


def test_linear_recurrence_with_a_equal_to_one_sums_since_the_reset():
    x = np.arange(1.0, 8.0)[:, None]
    reset = np.array([0, 0, 0, 1, 0, 0, 0], bool)
    h, _ = oracles.linear_recurrence(
        np.ones_like(x), x, initial_state=np.array([10.0]), reset=reset
    )
    close(h[:, 0], [11.0, 13.0, 16.0, 4.0, 9.0, 15.0, 22.0])
    back, _ = oracles.linear_recurrence(np.ones_like(x), x, reset=reset, reverse=True)
    close(back[:, 0], [10.0, 9.0, 7.0, 4.0, 18.0, 13.0, 7.0])


def test_ssd_of_one_state_is_the_selective_scan_of_it():
    """With heads of one channel each, sharing one group, the two are the same."""
    rng = np.random.default_rng(12)
    x, B, C = (rng.standard_normal((9, n)) for n in (3, 2, 2))
    dt, rate = rng.uniform(0.1, 0.9, (9, 3)), -rng.uniform(0.2, 2.0, 3)
    want_y, want_state = oracles.selective_scan(x, dt, np.tile(rate[:, None], 2), B, C)
    y, state = oracles.ssd(
        x[..., None], dt * rate, B[:, None], C[:, None], coefficient=dt
    )
    close(y[..., 0], want_y, 20)
    close(state[:, 0], want_state, 20)


def test_selective_scan_with_constant_parameters_is_a_filter():
    rng = np.random.default_rng(2)
    u, seq, dt, gain = rng.standard_normal(40), 40, 0.3, np.array([0.5, -1.2])
    A, read = np.array([[-0.7, -1.9]]), np.array([1.1, 0.4])
    y, final = oracles.selective_scan(
        u[:, None],
        np.full((seq, 1), dt),
        A,
        np.tile(gain, (seq, 1)),
        np.tile(read, (seq, 1)),
        np.array([0.25]),
    )
    want, states = 0.25 * u, []
    for n in range(2):
        h = lfilter([dt * gain[n]], [1.0, -np.exp(dt * A[0, n])], u)
        want, states = want + read[n] * h, [*states, h[-1]]
    close(y[:, 0], want, seq)
    close(final[0], states, seq)


def test_selective_scan_with_a_equal_to_zero_is_a_sum():
    ones = np.ones((3, 1))
    u, z = np.array([[1.0], [2.0], [3.0]]), np.array([[0.0], [1.0], [-1.0]])
    y, final = oracles.selective_scan(
        u,
        0.0 * ones,
        np.zeros((1, 1)),
        ones,
        ones,
        z=z,
        delta_bias=np.array([np.log(np.e - 1.0)]),  # softplus of it is one
        delta_softplus=True,
        initial_state=np.array([[4.0]]),
        reset=np.array([False, True, False]),
    )
    sigmoid = 1.0 / (1.0 + np.exp(-z[:, 0]))
    close(y[:, 0], np.array([5.0, 2.0, 5.0]) * z[:, 0] * sigmoid)
    close(final, [[5.0]])


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_causal_conv_is_numpy_convolve(dilation):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((12, 2)), rng.standard_normal((3, 2, 4))
    bias, memory = rng.standard_normal(3), 3 * dilation
    start = rng.standard_normal((memory, 2))
    y, final = oracles.causal_conv(
        x, weight, bias, dilation=dilation, initial_state=start
    )
    longer = np.concatenate([start, x])
    want = np.tile(bias, (12, 1))
    for o in range(3):
        for c in range(2):
            spread = np.zeros(memory + 1)
            spread[::dilation] = weight[o, c, ::-1]
            want[:, o] += np.convolve(longer[:, c], spread, mode="valid")
    close(y, want, 8)
    close(final, longer[-memory:])


def test_causal_conv_in_groups_is_one_convolution_a_group():
    rng = np.random.default_rng(4)
    x, weight = rng.standard_normal((2, 9, 6)), rng.standard_normal((4, 3, 2))
    y, _ = oracles.causal_conv(x, weight, groups=2)
    first, _ = oracles.causal_conv(x[..., :3], weight[:2])
    second, _ = oracles.causal_conv(x[..., 3:], weight[2:])
    close(y, np.concatenate([first, second], axis=-1))


def test_causal_conv_of_packed_tokens_by_hand():
    x = np.array([[1.0], [9.0], [2.0], [3.0], [4.0], [9.0]])
    ids = np.array([5, -1, 5, 6, 5, -2])
    y, final = oracles.causal_conv(
        x,
        np.array([[[10.0, 1.0]]]),
        np.array([0.5]),
        initial_state=np.array([[7.0]]),
        segment_ids=ids,
    )
    close(y[:, 0], [71.5, 0.0, 12.5, 3.5, 4.5, 0.0])
    close(final, [[4.0]])


def test_documents_skip_padding_and_restart_when_an_id_returns():
    ids = np.array([-1, 0, 0, -1, 0, 2, -3, 2, 0])
    assert oracles.documents(ids) == [[1, 2, 4], [5, 7], [8]]
    assert oracles.documents(np.array([-1, -1])) == []


def test_norms_against_their_vector_form():
    rng = np.random.default_rng(5)
    x, w, b = rng.standard_normal((2, 3, 7)), rng.standard_normal(7), np.arange(7.0)
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    close(oracles.rms_norm(x, w, eps=1e-3), x / rms * w, 7)
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    want = (x - x.mean(-1, keepdims=True)) / spread * w + b
    close(oracles.layer_norm(x, w, b, eps=1e-3), want, 7)


def mamba_params(d_model, d_inner, d_state, d_conv, dt_rank, rng):
    def normal(*shape):
        return rng.standard_normal(shape) * 0.5

    return {
        "in_proj.weight": normal(2 * d_inner, d_model),
        "conv1d.weight": normal(d_inner, 1, d_conv),
        "conv1d.bias": normal(d_inner),
        "x_proj.weight": normal(dt_rank + 2 * d_state, d_inner),
        "dt_proj.weight": normal(d_inner, dt_rank),
        "dt_proj.bias": normal(d_inner),
        "A_log": normal(d_inner, d_state),
        "D": normal(d_inner),
        "out_proj.weight": normal(d_model, d_inner),
    }


def test_mamba_layer_with_a_single_token_is_a_closed_form():
    rng = np.random.default_rng(6)
    p, x = mamba_params(3, 4, 2, 3, 2, rng), rng.standard_normal((1, 3))
    hidden, gate = np.split(p["in_proj.weight"] @ x[0], 2)
    hidden = p["conv1d.weight"][:, 0, -1] * hidden + p["conv1d.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    dt, B, C = np.split(p["x_proj.weight"] @ hidden, [2, 4])
    delta = np.log1p(np.exp(p["dt_proj.weight"] @ dt + p["dt_proj.bias"]))
    y = (delta * (B @ C) + p["D"]) * hidden * gate / (1 + np.exp(-gate))
    close(oracles.mamba_layer(p, x)[0], p["out_proj.weight"] @ y, 10)


def test_mamba_layer_packed_is_the_documents_apart():
    rng = np.random.default_rng(7)
    p, x = mamba_params(3, 4, 2, 3, 1, rng), rng.standard_normal((7, 3))
    ids = np.array([-1, 1, 1, -1, 2, 2, 1])
    y = oracles.mamba_layer(p, x, segment_ids=ids, activation="relu")
    close(y[[0, 3]], np.zeros((2, 3)))
    for chosen in ([1, 2], [4, 5], [6]):
        close(y[chosen], oracles.mamba_layer(p, x[chosen], activation="relu"))


def test_differences_stay_inside_their_own_bound():
    def function(point):
        return np.exp(point["x"][0]) * np.sin(2.0 * point["y"][0])

    point = {"x": np.array([0.3]), "y": np.array([-0.4])}
    along_x, along_y = {"x": np.array([1.0])}, {"y": np.array([1.0])}
    slope = 2.0 * np.exp(0.3) * np.cos(-0.8)
    curved = -4.0 * np.exp(0.3) * np.sin(-0.8)
    cases = [((along_y,), slope), ((along_x, along_y), slope)]
    cases += [((along_y, along_x, along_y), curved)]
    for directions, want in cases:
        got = directional_derivative(function, point, *directions)
        assert abs(got.value - want) <= got.bound
        assert got.bound <= [0.0, 1e-10, 1e-8, 1e-6][len(directions)]


def test_tolerances_fail_what_they_must():
    assert tolerance(np.float32, 4) == pytest.approx(8 * 2 * 2.0**-23)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(1.0 + 1e-5, 1.0, dtype=np.float32)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(np.nan, 1.0, dtype=np.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones(1), np.ones((1, 1)), dtype=np.float32)
    with pytest.raises(AssertionError, match="times"):
        assert_rounded(np.float32(1.0), np.array(1.001))
