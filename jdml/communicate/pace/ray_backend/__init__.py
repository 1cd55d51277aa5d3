"""Backend "ray": server and workers as processes that may die, on one machine or several.

:func:`local_session` opens Ray on this machine's loopback interface, :func:`ray_server` puts the
parameters into one process or several, :func:`run_ray` runs a process for each worker, and looks
after all of them. Ray is imported when it is needed: ``pip install 'jdml[ray]'``.

    with local_session(num_cpus=4):
        server = ray_server(params, Rule(asynchronous(), add(1 / 8)), 8, num_shards=2, lease=10)
        run = run_ray(server, lambda k: SgdWorker(k, make_task()), seconds=60)

- ``shard.py`` is a server's process, ``hand.py`` a worker's;
- ``server.py`` is what speaks to the server, from any process; ``shelf.py`` the shared memory
  through which parameters and updates pass on one machine;
- ``run.py`` is the supervisor, with ``keeper.py`` (snapshots, restored servers) and ``crew.py``
  (workers that fail and are started anew).
"""

from jdml.communicate.pace.ray_backend.errors import Unreachable as Unreachable
from jdml.communicate.pace.ray_backend.result import Happening as Happening
from jdml.communicate.pace.ray_backend.result import RayRun as RayRun
from jdml.communicate.pace.ray_backend.run import run_ray as run_ray
from jdml.communicate.pace.ray_backend.server import RayServer as RayServer
from jdml.communicate.pace.ray_backend.server import ShardedRayServer as ShardedRayServer
from jdml.communicate.pace.ray_backend.server import ray_server as ray_server
from jdml.communicate.pace.ray_backend.session import local_session as local_session
