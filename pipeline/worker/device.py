"""Where teachers run, and how pixels and features travel there and back."""

from typing import Any

import numpy as np
import torch


class Device:
    """The CPU with a fixed thread count, or one GPU with copies that overlap computing.

    One thread only may use a Device: results on the CPU are bit-identical only if every forward pass sees the same
    thread count, which is a property of the calling thread.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.is_cuda = name.startswith("cuda")
        torch.set_num_threads(threads)
        if self.is_cuda:
            torch.backends.cudnn.allow_tf32 = False  # precision fp32 means fp32; bf16 does not come this way
        self._copies: Any = torch.cuda.Stream(name) if self.is_cuda else None

    def upload(self, pixels: np.ndarray) -> torch.Tensor:
        """Bring uint8 [B, H, W, 3] to the device; on a GPU through pinned memory, without waiting."""
        host = torch.from_numpy(pixels)
        if not self.is_cuda:
            return host
        with torch.cuda.stream(self._copies):
            moved = host.pin_memory().to(self.name, non_blocking=True)
        torch.cuda.current_stream(self.name).wait_stream(self._copies)
        moved.record_stream(torch.cuda.current_stream(self.name))
        return moved

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised host memory that `download` can fill without waiting."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.is_cuda)

    def download(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `source` into host memory; on a GPU the data is there only after `synchronize`."""
        if not self.is_cuda:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.name))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._copies)

    def synchronize(self) -> None:
        """Wait until every copy and computation so far is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.name)


def choose_device() -> str:
    """The GPU that this process may use, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"
