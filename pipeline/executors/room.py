"""How many workers a cluster holds. `nodes` are the resources of each: counts of CPU, GPU and others by name."""

from collections import Counter
from collections.abc import Mapping, Sequence

from cache.errors import ConfigError
from pipeline.config import ExecutorConfig

Nodes = Sequence[Mapping[str, float]]


def gpus_per_worker(nodes: Nodes, config: ExecutorConfig) -> float:
    """As configured; `auto` is one where there are GPUs."""
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0


def count_workers(nodes: Nodes, config: ExecutorConfig, threads: int, gpus: float) -> int:
    """As many workers as the nodes can hold, or the number asked for if it fits.

    Raises:
        ConfigError: there is no room for one worker, or for as many as asked for: they would be waited for for ever.
    """
    room = sum(_room(node, threads, gpus) for node in nodes)
    wanted = room if config.workers == "auto" else config.workers
    if room < max(wanted, 1):
        raise ConfigError(
            f"executor.workers: expected room for {max(wanted, 1)} workers of {threads} CPU threads and {gpus:g} GPUs "
            f"each, found room for {room} in the cluster: {_described(nodes)}; ask for fewer workers, threads or "
            "gpus_per_worker"
        )
    return wanted


def _room(node: Mapping[str, float], threads: int, gpus: float) -> int:
    """How many workers one node can hold; a share of a GPU lies within one GPU."""
    room = int(node.get("CPU", 0) // threads)
    if not gpus:
        return room
    in_node = int(node.get("GPU", 0))
    return min(room, in_node * int(1 / gpus + 1e-9) if gpus < 1 else int(in_node // gpus))


def _described(nodes: Nodes) -> str:
    kinds = Counter(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return ", ".join(f"{count} nodes with {kind}" for kind, count in kinds.items()) or "no nodes"
