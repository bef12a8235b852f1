"""A cluster of several nodes on this machine, in a process of its own, as lines on its input say.

    python -m tests.faults.nodes FOLDER

`add` starts a node of two CPUs, `kill` ends the oldest raylet by SIGKILL, the end of the input ends all.
Each answer is a line: first the address, then the number of nodes that were started.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(folder: str) -> None:
    from ray.cluster_utils import Cluster

    (Path(os.environ["RAY_TMPDIR"]) / "ray").mkdir(parents=True, exist_ok=True)  # for its address file
    head = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": True, "dashboard_port": None}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    nodes = []
    for number, line in enumerate(map(str.strip, sys.stdin)):
        if line == "add":
            nodes.append(cluster.add_node(num_cpus=2))
        elif line == "kill":
            (raylet,) = nodes.pop(0).all_processes["raylet"]
            os.kill(raylet.process.pid, signal.SIGKILL)
            raylet.process.wait()
        print(number, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
