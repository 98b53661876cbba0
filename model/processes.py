"""One process or several (torchrun): who am I, and what do all agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among all: rank 0 writes and speaks."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, code: int) -> int:
        """The largest code that any process brings; every process must call it at the same place."""
        if self.world == 1:
            return code
        value = torch.tensor(code, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values


def start_processes(device: str) -> Processes:
    """Joins the other processes if torchrun started this one.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(int(os.environ.get("RANK", "0")), world, chosen)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu, or install a CUDA build and a driver")
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
