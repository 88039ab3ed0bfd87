"""Smooth ECE: a calibration error without bins (Blasiok and Nakkiran 2023, arXiv 2309.12236).

The residuals (right - confidence) are smoothed along confidence by a Gaussian of width sigma reflected at 0 and 1, and

    smECE_sigma = integral over t in [0, 1] of |(1/N) sum_i K_sigma(t, confidence_i) (right_i - confidence_i)|

falls as sigma grows. The smooth ECE is the value at which width and error are one number: smECE_sigma = sigma.

Residuals are summed onto GRID points, and the kernel is applied through its spectrum: reflection at both ends makes a signal
even and of period 2, where a Gaussian of width sigma multiplies frequency k by exp(-(pi k sigma)^2 / 2), all reflections
included. Rounding a confidence to the grid is as if sigma^2 were larger by 1 / (12 GRID^2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmrl.ats.binned import equal_width_bins

Array = NDArray[np.float64]
GRID = 1024
_TOLERANCE = 1e-7


def residuals_on_grid(confidence: Array, correct: NDArray[np.bool_]) -> Array:
    """Return `[GRID]`: the residuals right - confidence, divided by N and summed per cell of confidence."""
    return np.bincount(equal_width_bins(confidence, GRID), correct - confidence, minlength=GRID) / len(confidence)


def smooth_on_grid(values: Array, bandwidth: float) -> Array:
    """Return `[..., GRID]` convolved with the reflected Gaussian; sums over the grid are kept."""
    frequency = np.arange(GRID + 1)
    spectrum = np.fft.rfft(np.concatenate([values, values[..., ::-1]], axis=-1))
    spectrum *= np.exp(-0.5 * (np.pi * frequency * bandwidth) ** 2)
    return np.fft.irfft(spectrum, n=2 * GRID)[..., :GRID]


def smooth_ece_at(residuals: Array, bandwidth: float) -> Array:
    """Return `[...]`: smECE at a fixed width, of residuals on the grid `[..., GRID]`."""
    return np.abs(smooth_on_grid(residuals, bandwidth)).sum(-1)


def smooth_ece(confidence: Array, correct: NDArray[np.bool_]) -> float:
    """Return the smooth ECE, which is also the width it was measured with.

    Values below 1 / GRID are not resolved: the width goes no lower than that.
    """
    residuals = residuals_on_grid(confidence, correct)
    low, high, bandwidth, value = 1.0 / GRID, 1.0, 0.05, 0.0
    for _ in range(100):  # some ten are needed
        value = float(smooth_ece_at(residuals, bandwidth))
        # the error falls as the width grows, so the solution lies between the two
        low, high = max(low, min(bandwidth, value)), min(high, max(bandwidth, value))
        if high - low < _TOLERANCE or abs(value - bandwidth) < _TOLERANCE:
            break
        # exact where the error falls with slope -1/2, as pure sampling noise does at its solution
        bandwidth += (value - bandwidth) / 1.5
        if not low < bandwidth < high:
            bandwidth = (low + high) / 2
    return value
