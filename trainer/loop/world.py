"""The processes that train together, and the device that each uses."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kpu.errors import ConfigError, KpuError
from kpu.util.cores import usable_cores
from trainer.config import TrainConfig
from trainer.util.allocator import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This process among `size` of them, `local_size` on this machine; the one of rank 0 writes.

    `joined` says that this process created the process group, and must destroy it.
    """

    rank: int
    size: int
    device: torch.device
    precision: str
    local_size: int = 1
    joined: bool = False

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

    def lead(self, work: Callable[[], None]) -> None:
        """Do `work` in the leading process while the others wait.

        Raises:
            KpuError: in every process, what `work` raised.
        """
        raised: list[KpuError | None] = [None]
        if self.leads:
            try:
                work()
            except KpuError as error:
                raised = [error]
        if self.size > 1:
            dist.broadcast_object_list(raised, src=0)
        if raised[0] is not None:
            raise raised[0]

    def agree(self, value: bool) -> bool:
        """What `value` is in the leading process, in every process: figures may differ in the last digit."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def leave(self) -> None:
        """End a meeting that `join_world` began."""
        if self.joined:
            dist.destroy_process_group()


def join_world(config: TrainConfig) -> World:
    """Choose the device, fix the number of threads, and meet the other processes, where there are some.

    Other processes are those of `torchrun`, or of a process group that exists already.

    Raises:
        ConfigError: there is no GPU, though one is asked for; or the processes are not as many as `workers`.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU, found none that PyTorch can use; use --set device=cpu")
    cuda = torch.cuda.is_available() and config.device != "cpu"
    joins = under_launcher() and not dist.is_initialized()
    size = int(os.environ["WORLD_SIZE"]) if joins else dist.get_world_size() if dist.is_initialized() else 1
    if size != config.workers:
        raise ConfigError(
            f"workers: expected as many as there are processes, {size}, found {config.workers}; set workers={size}, or "
            "start with --workers"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if joins:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        keep_freed_memory()
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size > 1 else 1
    threads = config.threads if config.threads != "auto" else max(1, usable_cores() // beside)
    torch.set_num_threads(threads)
    precision = config.precision if config.precision != "auto" else ("bf16" if cuda else "fp32")
    rank = dist.get_rank() if dist.is_initialized() else 0
    return World(rank, size, device, precision, beside, joins)


def under_launcher() -> bool:
    """Whether `torchrun`, or something like it, started this process among others."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
