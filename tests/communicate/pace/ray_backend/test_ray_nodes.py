"""A node of two is lost, with a worker and a shard of the server on it."""

import contextlib
import os
import threading
import time
from unittest import mock

import pytest

from jdml.communicate.pace import Rule, add, asynchronous
from jdml.communicate.pace.ray_backend import ray_server, run_ray
from jdml.communicate.pace.ray_backend.session import (
    ENVIRONMENT,
    LOOPBACK,
    forks_expected,
    import_ray,
)
from tests.communicate.pace.problems import start
from tests.communicate.pace.ray_backend.listeners import listeners
from tests.communicate.pace.ray_backend.tasks import Note, TimedWorkers
from tests.communicate.pace.ray_backend.test_ray_run import check_once_each, happened, notes


@pytest.fixture
def two_nodes():
    """``(the other node's name, what takes it away)``."""
    ray = import_ray()
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": LOOPBACK, "object_store_memory": 100_000_000}
    with mock.patch.dict(os.environ, ENVIRONMENT), contextlib.ExitStack() as stack:
        stack.enter_context(forks_expected())
        cluster = Cluster(shutdown_at_exit=False)
        stack.callback(cluster.shutdown)
        cluster.add_node(**node, num_cpus=8, include_dashboard=False)
        stack.callback(ray.shutdown)
        ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=LOOPBACK)
        other = cluster.add_node(**node, num_cpus=8)
        yield other.node_id, lambda: cluster.remove_node(other, allow_graceful=False)


@pytest.mark.slow
def test_a_node_of_two_is_lost(two_nodes, tmp_path):
    other, take_away = two_nodes
    spread = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    server = ray_server(
        start(),
        Rule(asynchronous(), add(0.5)),
        2,
        num_shards=2,
        lease=4,
        on_applied=Note(tmp_path),
        actor_options=spread,
    )
    on_other = [shard.name for shard in server.servers if shard.place()[0] == other]
    assert len(on_other) == 1
    lost_at, enough = [], threading.Event()

    def lose(happening):
        if happening.what == "started" and happening.who == "worker 1" and not lost_at:
            lost_at.append(time.monotonic())
            threading.Timer(1.0, take_away).start()
        if happening.what == "restored":
            threading.Timer(2.0, enough.set).start()

    assert {address for _, address in listeners()} <= {LOOPBACK, "::1"}
    run = run_ray(
        server,
        TimedWorkers([0.01, 0.01]),
        seconds=60,
        stop=enough,
        snapshot_every_seconds=0.3,
        worker_options=spread,
        on_happening=lose,
    )
    assert happened(run, "lost") == happened(run, "restored") == on_other
    assert sum(run.restarts.values()) == 1
    assert not run.gone
    for applied in notes(tmp_path).values():
        check_once_each(applied)
    assert run.happenings[-1].wall_seconds < 30
