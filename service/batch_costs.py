"""How long a batch takes, by its size, and therefore which size is worth running. Pure arithmetic, no clock.

n images in a batch, s(n) seconds for them: the warm-up measured some s(n), the sizes between are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

RATE_TOLERANCE = 0.98
"""A smaller batch that gives this share of the best images per second is preferred: its images are answered sooner."""
DRIFT_WEIGHT = 0.1
"""Weight of the newest run in the running average of measured over expected seconds: about the last twenty runs count."""
DRIFT_BOUNDS = (0.1, 10.0)
"""One run may count at most for this ratio, so that a single stall does not set the estimate for seconds."""
RUNS_UNTIL_RAISE = 1000
"""After so many runs without complaint a lowered limit is doubled: what filled the device's memory may have gone."""


class BatchCosts:
    """Seconds of a batch by size: the warm-up's table times a drift that follows what runs take now.

    The table alone decides which size pays, since one slow run must not rule a size out for good; the drift scales
    every estimate of waiting time.
    """

    def __init__(self, measured: Mapping[int, float], max_batch_size: int) -> None:
        """Take the warm-up's measurements.

        Args:
            measured: batch size -> seconds, at least one entry.
            max_batch_size: no batch is ever larger.

        Raises:
            ValueError: an empty table, a size below 1 or a time that is not positive and finite.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; at least 1 is needed")
        if not measured:
            raise ValueError("the cost table is empty; warm the runtime up with at least one batch size")
        for size, seconds in measured.items():
            if size < 1 or not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"cost table: {size} images in {seconds} s; expected a size of 1 or more and a positive time")
        self._table = [0.0, *(_interpolate(measured, size) for size in range(1, max_batch_size + 1))]
        self._drift = 1.0
        self._runs_since_limit = 0
        self._favoured = self._choose(max_batch_size)

    @property
    def limit(self) -> int:
        """The largest batch that is allowed now."""
        return len(self._favoured) - 1

    @property
    def drift(self) -> float:
        """Measured over expected seconds, a running average; 1 as long as nothing ran."""
        return self._drift

    def seconds(self, size: int) -> float:
        """Expected seconds of one batch of `size` images, 0 for none, as runs take now."""
        return self._table[size] * self._drift

    @property
    def shortest_s(self) -> float:
        """No image can be answered sooner than this: one image alone, at the faster of warm-up and now."""
        return self._table[1] * min(1.0, self._drift)

    def favoured(self, waiting: int) -> int:
        """The batch to take when `waiting` images (1 or more) wait: the most images a second, and the smallest of those that tie."""
        return self._favoured[min(waiting, self.limit)]

    def drain_seconds(self, images: int) -> float:
        """Seconds that one device needs for `images` waiting images, in favoured batches."""
        size = self._favoured[-1]
        full, rest = divmod(images, size)
        return full * self.seconds(size) + self.seconds(rest)

    def observe(self, size: int, seconds: float) -> None:
        """Take note that a batch of `size` images took `seconds`."""
        low, high = DRIFT_BOUNDS
        ratio = min(max(seconds / self._table[size], low), high)
        self._drift += DRIFT_WEIGHT * (ratio - self._drift)
        self._runs_since_limit += 1
        if self._runs_since_limit >= RUNS_UNTIL_RAISE and self.limit < len(self._table) - 1:
            self._set_limit(min(2 * self.limit, len(self._table) - 1))

    def lower_limit(self, limit: int) -> None:
        """Allow no batch above `limit` images (never below 1) for a while: what the device's memory turned out to hold."""
        self._set_limit(max(1, min(limit, self.limit)))

    def _set_limit(self, limit: int) -> None:
        self._runs_since_limit = 0
        self._favoured = self._choose(limit)

    def _choose(self, limit: int) -> list[int]:
        """Favoured size by number of waiting images, 0..limit."""
        rates = [0.0, *(size / self._table[size] for size in range(1, limit + 1))]
        chosen, best = [0], 0.0
        for waiting in range(1, limit + 1):
            best = max(best, rates[waiting])
            chosen.append(next(size for size in range(1, waiting + 1) if rates[size] >= RATE_TOLERANCE * best))
        return chosen


def _interpolate(measured: Mapping[int, float], size: int) -> float:
    """Linear between the neighbours; beyond the last one on its slope from the origin, which promises no gain nobody measured."""
    if size in measured:
        return measured[size]
    below = max((known for known in measured if known < size), default=None)
    above = min((known for known in measured if known > size), default=None)
    if below is None:
        assert above is not None  # the table is not empty
        return measured[above]  # the runtime would do at least this well with fewer images
    if above is None:
        return measured[below] * size / below
    share = (size - below) / (above - below)
    return measured[below] + share * (measured[above] - measured[below])
