"""Whether something grows: the straight line through noisy samples, with what the scatter leaves uncertain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def trend(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of the least squares' line, and twice its standard error; both 0 for fewer than three samples."""
    if len(x) < 3:
        return 0.0, 0.0
    slope, offset = np.polyfit(x, y, 1)
    scatter = float(np.sum((y - slope * x - offset) ** 2)) / (len(x) - 2)
    return float(slope), 2 * (scatter / float(np.sum((x - x.mean()) ** 2))) ** 0.5
