"""What is free on the machine, as vLLM's CPU worker sees it."""

from __future__ import annotations

import math
from typing import Any

import psutil
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info, get_visible_memory_node

from operators.core.cgroup import memory_left
from steer_server.engine.vllm.memory import share_of_free


def free_share(config: Any) -> float:
    """The share of its node's memory that a worker on this CPU may take now; a container's limit counts as all memory.

    ``config``: vLLM's, for its number of workers.
    """
    nodes, node = get_visible_memory_node(), get_allowed_cpu_list()[0].numa_node
    status = get_memory_node_info(node if node in nodes else nodes[0])
    # The node's figure counts all file pages as free, the system's those that it can give up without swapping.
    available = min(status.available_memory, psutil.virtual_memory().available)
    # vLLM knows the limit of the outermost group only: that of a service or of a slice is further in.
    if (left := memory_left()) is not None:
        available = min(available, left)
    return share_of_free(status.total_memory, available, math.ceil(config.parallel_config.world_size / len(nodes)))
