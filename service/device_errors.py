"""What a device may do to a batch, told apart because each calls for another answer. Any other exception is taken for a bad image."""

from __future__ import annotations


class DeviceOutOfMemory(RuntimeError):  # an event of the device, and the name that operators search for
    """The batch did not fit into the device's memory; a smaller one may. The device itself is well."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more (a sticky CUDA error, a card off the bus). Only a new process helps."""
