"""How many workers a cluster holds."""

from typing import Any

import pytest

from kpu.errors import ConfigError
from pipeline.executors.room import count_by_gpus, count_workers, gpus_per_worker, held_by_others, threads_per_worker
from pipeline.sections import ExecutorConfig

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


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "threads"),
    [
        ([GPU_NODE], 1, "auto", 8),  # every GPU has a worker
        ([GPU_NODE], 0.5, "auto", 4),
        ([GPU_NODE], 3, "auto", 32),
        ([LAPTOP, GPU_NODE], 1, "auto", 8),  # a node without GPUs has no say
        ([{"CPU": 8.0, "GPU": 4.0}, GPU_NODE], 1, "auto", 2),
        ([{"CPU": 2.0, "GPU": 4.0}], 1, "auto", 1),
        ([LAPTOP], 0, "auto", 8),
        ([LAPTOP, {"CPU": 2.0}], 0, "auto", 2),
        ([LAPTOP, {"CPU": 0.0}], 0, "auto", 8),  # a head that computes nothing
        ([LAPTOP], 0, 3, 2),
        ([LAPTOP], 0, 99, 1),
        ([GPU_NODE], 1, 2, 8),
        ([], 0, "auto", 1),
    ],
)
def test_auto_threads_leave_every_gpu_a_worker(
    nodes: list[dict[str, float]], gpus: float, workers: Any, threads: int
) -> None:
    config = ExecutorConfig(kind="ray", workers=workers)
    assert threads_per_worker(nodes, config, gpus) == threads


def test_gpus_that_cpus_do_not_suffice_for_can_be_told() -> None:
    nodes = [{"CPU": 2.0, "GPU": 4.0}]
    assert count_by_gpus(nodes, 1) == 4
    assert count_workers(nodes, AUTO, threads_per_worker(nodes, AUTO, 1), 1) == 2


def test_one_gpu_a_worker_where_there_are_gpus() -> None:
    assert gpus_per_worker([LAPTOP], AUTO) == 0
    assert gpus_per_worker([LAPTOP, GPU_NODE], AUTO) == 1
    assert gpus_per_worker([GPU_NODE], ExecutorConfig(kind="ray", gpus_per_worker=0.25)) == 0.25


def test_what_others_hold_is_told() -> None:
    warning = held_by_others([GPU_NODE, LAPTOP], {"CPU": 40.0, "GPU": 0.5}, 8, 1)
    assert warning is not None
    assert "a worker of 8 CPU threads and 1 GPUs, found 0 CPUs and 3.5 GPUs of the cluster held by others" in warning
    assert held_by_others([LAPTOP], {}, 1, 0) is not None  # Ray leaves out what is all taken
    assert held_by_others([GPU_NODE, LAPTOP], {"CPU": 8.0, "GPU": 1.0}, 8, 1) is None
