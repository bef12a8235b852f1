"""Ray's provider of nodes that are processes on one machine, with one correction."""

from __future__ import annotations

import uuid
from functools import partial
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):
    """Each node unpacks working directories in a folder of its own, as machines do.

    In a common one, a node that starts removes and unpacks again what the driver and the workers of the
    others run in: the driver then ends with `No such file or directory` for its current folder.
    """

    def _create_node_with_resources_and_labels(self, *arguments, **options):
        own = partial(parameter.RayParams, runtime_env_dir_name=f"runtime_resources_{uuid.uuid4().hex[:8]}")
        with self.lock, mock.patch.object(parameter, "RayParams", own):
            return super()._create_node_with_resources_and_labels(*arguments, **options)
