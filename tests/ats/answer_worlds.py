"""Confidences and answers without a random generator, so that other packages can be run on the same numbers."""

import numpy as np


def answers(count, tilt):
    """Return confidences in [.05, .95] and answers right with probability confidence - tilt * sin(2 confidence)."""
    k = np.arange(1, count + 1)
    confidence = 0.05 + 0.9 * np.sqrt(np.modf(k * 0.6180339887498949)[0])
    uniform = np.modf(k * 0.41421356237309515 + k * k * 0.0718281828)[0]
    return confidence, uniform < np.clip(confidence - tilt * np.sin(2 * confidence), 0, 1)
