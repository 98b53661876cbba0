"""Images whose dense NMS did not settle within the graph's rounds, finished exactly by further runs of the same graph.

A file with dense NMS gives, beside the four outputs, `nms_converged` bool [B] and the masks `nms_state` bool [B, C] in which it
stopped; its optional input `nms_start` takes such masks back. `nms_converged` certifies that an answer is that of greedy NMS. An image
without the certificate is run again, alone, from where it stopped, until it has it: every run settles at least one more box of each
suppression, so no more runs are needed than there are boxes. A picture that is made to need many costs its own time and nobody a
wrong box.

B images, C boxes of all suppressions of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InferenceFailed

NMS_CONVERGED, NMS_STATE, NMS_START = "nms_converged", "nms_state", "nms_start"

RunFrom = Callable[[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]], Sequence[NDArray[Any]]]
"""(one image [1, H, W, 3], its size [1, 2], masks [1, C]) -> the four outputs, nms_converged, nms_state."""


def finish(
    outputs: Sequence[NDArray[Any]], images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64], run_from: RunFrom
) -> list[NDArray[Any]]:
    """The four outputs of a batch, with the rows of unsettled images replaced by their exact answers.

    Args:
        outputs: of the batch's run: the four, nms_converged, nms_state.
        run_from: runs one image from given masks.

    Raises:
        InferenceFailed: the masks had no effect, so this runtime cannot finish the image.
    """
    *answer, converged, state = outputs
    rows = [np.array(part) for part in answer]  # what a runtime gives may be read-only
    for i in np.flatnonzero(~converged).tolist():
        exact = _settle(images[i : i + 1], image_sizes_hw[i : i + 1], state[i : i + 1], run_from)
        for row, part in zip(rows, exact, strict=True):
            row[i] = part[0]
    return rows


def _settle(image: NDArray[np.uint8], size_hw: NDArray[np.int64], state: NDArray[np.bool_], run_from: RunFrom) -> Sequence[NDArray[Any]]:
    for _ in range(state.shape[1] + 2):  # two stages: the second settles after the first
        *answer, converged, following = run_from(image, size_hw, state)
        if converged[0]:
            return answer
        if np.array_equal(following, state):
            break  # a mask that is not the fixed point never comes back to itself: the runtime did not look at it
        state = following
    raise InferenceFailed("the boxes of this image could not be told apart with certainty; try another size or encoding of it")
