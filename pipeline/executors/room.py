"""How many workers a cluster holds. `nodes` are the resources of each: counts of CPU, GPU and others by name."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kpu.errors import ConfigError
from pipeline.sections import ExecutorConfig

Nodes = Sequence[Mapping[str, float]]


def gpus_per_worker(nodes: Nodes, config: ExecutorConfig) -> float:
    """As configured; `auto` is one where there are GPUs."""
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0


def threads_per_worker(nodes: Nodes, config: ExecutorConfig, gpus: float) -> int:
    """CPU threads that leave every GPU a worker, or without GPUs every node one; fewer for `workers` that are more."""
    shares = [int(node.get("CPU", 0) // max(_by_gpus(node, gpus), 1)) for node in nodes if _by_gpus(node, gpus)]
    most = max(1, min(shares, default=1))
    if config.workers == "auto":
        return most
    fitting = (threads for threads in range(most, 0, -1) if count_room(nodes, threads, gpus) >= config.workers)
    return next(fitting, 1)


def count_room(nodes: Nodes, threads: int, gpus: float) -> int:
    """How many workers all nodes can hold."""
    return sum(_room(node, threads, gpus) for node in nodes)


def count_by_gpus(nodes: Nodes, gpus: float) -> int:
    """How many workers the GPUs are enough for; without GPUs, one a node."""
    return sum(_by_gpus(node, gpus) for node in nodes)


def count_workers(nodes: Nodes, config: ExecutorConfig, threads: int, gpus: float) -> int:
    """As many workers as the nodes can hold, or the number asked for if it fits.

    Raises:
        ConfigError: there is no room for one worker, or for as many as asked for: the run would block forever.
    """
    room = count_room(nodes, threads, gpus)
    wanted = room if config.workers == "auto" else config.workers
    if room < max(wanted, 1):
        raise ConfigError(
            f"executor.workers: expected room for {max(wanted, 1)} workers of {threads} CPU threads and {gpus:g} GPUs "
            f"each, found room for {room} in the cluster: {_described(nodes)}; ask for fewer workers, threads or "
            "gpus_per_worker"
        )
    return wanted


def held_by_others(nodes: Nodes, available: Mapping[str, float], threads: int, gpus: float) -> str | None:
    """A warning where what is free in all nodes together holds no worker; None if it might hold one."""
    if available.get("CPU", 0) >= threads and available.get("GPU", 0) >= gpus:
        return None
    cpus, cards = (sum(node.get(kind, 0) for node in nodes) - available.get(kind, 0) for kind in ("CPU", "GPU"))
    return (
        f"executor.workers: expected room for a worker of {threads} CPU threads and {gpus:g} GPUs, found "
        f"{cpus:g} CPUs and {cards:g} GPUs of the cluster held by others; waiting until they are free: end the other "
        "jobs, or stop this one and ask for fewer threads or gpus_per_worker"
    )


def _room(node: Mapping[str, float], threads: int, gpus: float) -> int:
    """How many workers one node can hold."""
    room = int(node.get("CPU", 0) // threads)
    return min(room, _by_gpus(node, gpus)) if gpus else room


def _by_gpus(node: Mapping[str, float], gpus: float) -> int:
    """How many workers the GPUs of a node are for, a share of a GPU within one GPU; without GPUs, one."""
    if not gpus:
        return 1 if node.get("CPU", 0) >= 1 else 0
    in_node = int(node.get("GPU", 0))
    return in_node * int(1 / gpus + 1e-9) if gpus < 1 else int(in_node // gpus)


def _described(nodes: Nodes) -> str:
    kinds = Counter(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return ", ".join(f"{count} nodes with {kind}" for kind, count in kinds.items()) or "no nodes"
