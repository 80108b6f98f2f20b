"""How many workers a cluster holds."""

import pytest

from cache.errors import ConfigError
from pipeline.config import ExecutorConfig
from pipeline.executors.room import count_workers, gpus_per_worker

LAPTOP = {"CPU": 8.0, "memory": 1e10, "node:127.0.0.1": 1.0}
GPU_NODE = {"CPU": 32.0, "GPU": 4.0}
AUTO = ExecutorConfig(kind="ray")


@pytest.mark.parametrize(
    ("nodes", "threads", "gpus", "room"),
    [
        ([LAPTOP], 8, 0, 1),
        ([LAPTOP], 3, 0, 2),
        ([LAPTOP, LAPTOP], 8, 0, 2),
        ([LAPTOP, LAPTOP], 5, 0, 2),  # the three CPUs left in each do not add up to a worker
        ([GPU_NODE], 4, 1, 4),
        ([GPU_NODE], 16, 1, 2),
        ([GPU_NODE, LAPTOP], 4, 1, 4),
        ([GPU_NODE], 1, 0.5, 8),
        ([GPU_NODE], 1, 0.4, 8),  # two shares a GPU: no worker has shares of two
        ([GPU_NODE], 1, 2, 2),
    ],
)
def test_auto_is_all_that_the_nodes_hold(nodes: list[dict[str, float]], threads: int, gpus: float, room: int) -> None:
    assert count_workers(nodes, AUTO, threads, gpus) == room


def test_a_number_asked_for_is_taken_where_it_fits() -> None:
    assert count_workers([LAPTOP], ExecutorConfig(kind="ray", workers=2), 2, 0) == 2


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "gpus"),
    [([LAPTOP], 2, 8, 0), ([LAPTOP, LAPTOP], "auto", 16, 0), ([LAPTOP], "auto", 1, 1), ([], "auto", 1, 0)],
)
def test_workers_that_would_wait_for_ever_are_refused(
    nodes: list[dict[str, float]], workers: int, threads: int, gpus: float
) -> None:
    with pytest.raises(ConfigError, match=r"executor\.workers: expected room for .* found room for"):
        count_workers(nodes, ExecutorConfig(kind="ray", workers=workers), threads, gpus)


def test_one_gpu_a_worker_where_there_are_gpus() -> None:
    assert gpus_per_worker([LAPTOP], AUTO) == 0
    assert gpus_per_worker([LAPTOP, GPU_NODE], AUTO) == 1
    assert gpus_per_worker([GPU_NODE], ExecutorConfig(kind="ray", gpus_per_worker=0.25)) == 0.25
