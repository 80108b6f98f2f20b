"""The processes that train together, and the device that each uses."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cache.errors import ConfigError
from trainer.config import TrainConfig


@dataclass(frozen=True)
class World:
    """This process among `size` of them; the one of rank 0 writes."""

    rank: int
    size: int
    device: torch.device
    precision: str

    @property
    def leads(self) -> bool:
        """Whether this process writes what is kept."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """The part of a batch that is this process's."""
        own = batch_size // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def join_world(config: TrainConfig) -> World:
    """Choose the device, fix the number of threads, and meet the other processes, where there are some.

    Other processes are those of `torchrun`, or of a process group that stands already.

    Raises:
        ConfigError: there is no GPU, though one is asked for; or the processes are not as many as `workers`.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU, found none that PyTorch can use; use --set device=cpu")
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size != config.workers:
        raise ConfigError(
            f"workers: expected as many as there are processes, {size}, found {config.workers}; set workers={size}, or "
            "start with --workers"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    threads = config.threads if config.threads != "auto" else max(1, len(os.sched_getaffinity(0)) // size)
    torch.set_num_threads(threads)
    precision = config.precision if config.precision != "auto" else ("bf16" if cuda else "fp32")
    return World(rank, size, device, precision)
