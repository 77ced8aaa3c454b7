"""The predictor of zeros in float64 NumPy, one neuron after the other."""

import numpy as np


def fit(weight, bias, samples):
    """Slope, intercept and correlation of each neuron by NumPy's own."""
    lines = []
    for row, shift in zip(weight, bias, strict=True):
        bits = np.sign(samples) @ np.sign(row)
        z = samples @ row + shift
        slope, intercept = np.polyfit(bits, z, 1)
        lines.append((slope, intercept, np.corrcoef(bits, z)[0, 1]))
    return np.asarray(lines).T


def angle(left, right) -> float:
    """In degrees, between two vectors; undefined where one of them is zero."""
    left, right = (x / np.linalg.norm(x) for x in (left, right))
    half = np.arctan2(np.linalg.norm(left - right), np.linalg.norm(left + right))
    return float(np.degrees(2 * half))


def leaders(weight, reliable, max_angle):
    """Whom each neuron follows, itself if it leads."""
    count = len(weight)
    angles = np.full((count, count), np.inf)
    for i in range(count):
        for j in range(count):
            if np.any(weight[i]) and np.any(weight[j]):
                angles[i, j] = angle(weight[i], weight[j])
    near = angles <= max_angle
    leading = [i for i in range(count) if not reliable[i]]
    for i in sorted(range(count), key=lambda i: -near[i].sum()):
        if i not in leading and not near[i, leading].any():
            leading.append(i)
    nearest = [min(leading, key=lambda j, i=i: angles[i, j]) for i in range(count)]
    return np.asarray([i if i in leading else nearest[i] for i in range(count)])


def outputs(weight, bias, slope, intercept, leader, threshold, x):
    """Outputs of rows, which of them were skipped, and which of these were not zero."""
    y = np.zeros((len(x), len(weight)))
    skipped, wrong = np.zeros(y.shape, bool), np.zeros(y.shape, bool)
    for token, row in enumerate(x):
        for i, own in enumerate(leader):
            z = weight[i] @ row + bias[i]
            estimate = slope[i] * (np.sign(weight[i]) @ np.sign(row)) + intercept[i]
            leading = weight[own] @ row + bias[own]
            if own != i and leading <= 0 and estimate <= threshold:
                skipped[token, i], wrong[token, i] = True, z > 0
            else:
                y[token, i] = max(z, 0)
    return y, skipped, wrong
