"""Pace: when the workers' answers arrive, and who waits for whom.

What a lockstep program cannot express: workers that really do not wait. A :class:`Server` holds the
parameters; workers pull them, compute, and push what they found, each at its own pace. Four parts:

- ``server.py``: the one interface, whatever the backend, with ``members.py`` (who takes part, which
  push came when), ``model.py`` (what becomes of it), ``payload.py`` (what travels),
  ``sharded.py`` (several servers as one);
- ``rules/``: a :class:`Rule` is a *pace* (who may read when) and an *apply* (what an update does);
  any goes with any::

      Rule(synchronous(), average())                 # lockstep
      Rule(stale_synchronous(4), add(1 / 8))         # nobody more than 4 clocks ahead
      Rule(asynchronous(), dc_asgd(0.1))             # delay-compensated
      Rule(asynchronous(), delayed_nesterov(0.7, 0.9, buffer_size=8))
      Rule(asynchronous(), elastic_centre(0.9 / 8))  # EASGD
      Rule(backup(2), average())                     # the last two of a round are refused
      async_admm(num_reports=4, max_age=3)           # partial barrier, bounded delay

- ``workers/``: what one worker does, as a generator of requests: any loss, any local Optax chain;
- backends, which answer those requests: ``threads/`` has a thread and a device for each worker,
  and Hogwild, which needs no server; ``ray_backend/`` has processes, on one machine or several, and
  starts those anew that fail; ``virtual/`` simulates clocks and a network. ``drive.py`` is the loop
  of a worker in wall time, ``supervise.py`` what follows when one fails, ``whole.py`` what is saved
  of a run.

``arrivals.py`` has the models of the clocks, which lockstep methods use too.
"""

from jdml.communicate.pace.arrivals import Arrivals as Arrivals
from jdml.communicate.pace.arrivals import by_worker as by_worker
from jdml.communicate.pace.arrivals import constant as constant
from jdml.communicate.pace.arrivals import heavy_tailed as heavy_tailed
from jdml.communicate.pace.arrivals import log_normal as log_normal
from jdml.communicate.pace.arrivals import masked as masked
from jdml.communicate.pace.arrivals import pausing as pausing
from jdml.communicate.pace.arrivals import recorded as recorded
from jdml.communicate.pace.connection import Connection as Connection
from jdml.communicate.pace.errors import Closed as Closed
from jdml.communicate.pace.errors import Evicted as Evicted
from jdml.communicate.pace.errors import PaceError as PaceError
from jdml.communicate.pace.errors import StaleTimeout as StaleTimeout
from jdml.communicate.pace.messages import Ack as Ack
from jdml.communicate.pace.messages import Applied as Applied
from jdml.communicate.pace.messages import Arrival as Arrival
from jdml.communicate.pace.messages import MemberInfo as MemberInfo
from jdml.communicate.pace.messages import Registration as Registration
from jdml.communicate.pace.messages import Snapshot as Snapshot
from jdml.communicate.pace.messages import Traffic as Traffic
from jdml.communicate.pace.ray_backend import RayRun as RayRun
from jdml.communicate.pace.ray_backend import local_session as local_session
from jdml.communicate.pace.ray_backend import ray_server as ray_server
from jdml.communicate.pace.ray_backend import run_ray as run_ray
from jdml.communicate.pace.rules import Rule as Rule
from jdml.communicate.pace.rules import add as add
from jdml.communicate.pace.rules import async_admm as async_admm
from jdml.communicate.pace.rules import asynchronous as asynchronous
from jdml.communicate.pace.rules import average as average
from jdml.communicate.pace.rules import backup as backup
from jdml.communicate.pace.rules import dc_asgd as dc_asgd
from jdml.communicate.pace.rules import dc_asgd_adaptive as dc_asgd_adaptive
from jdml.communicate.pace.rules import delayed_nesterov as delayed_nesterov
from jdml.communicate.pace.rules import elastic_centre as elastic_centre
from jdml.communicate.pace.rules import local_steps_by_speed as local_steps_by_speed
from jdml.communicate.pace.rules import optimise as optimise
from jdml.communicate.pace.rules import partial_barrier as partial_barrier
from jdml.communicate.pace.rules import stale_synchronous as stale_synchronous
from jdml.communicate.pace.rules import synchronous as synchronous
from jdml.communicate.pace.server import Server as Server
from jdml.communicate.pace.sharded import AnyServer as AnyServer
from jdml.communicate.pace.sharded import ShardedServer as ShardedServer
from jdml.communicate.pace.supervise import OnFailure as OnFailure
from jdml.communicate.pace.threads import HogwildRun as HogwildRun
from jdml.communicate.pace.threads import Rows as Rows
from jdml.communicate.pace.threads import WallEvaluation as WallEvaluation
from jdml.communicate.pace.threads import WallRun as WallRun
from jdml.communicate.pace.threads import hogwild as hogwild
from jdml.communicate.pace.threads import run_threads as run_threads
from jdml.communicate.pace.virtual import Network as Network
from jdml.communicate.pace.virtual import Outage as Outage
from jdml.communicate.pace.virtual import VirtualClock as VirtualClock
from jdml.communicate.pace.virtual import VirtualRun as VirtualRun
from jdml.communicate.pace.virtual import VirtualSeconds as VirtualSeconds
from jdml.communicate.pace.virtual import simulate as simulate
from jdml.communicate.pace.workers import AdmmWorker as AdmmWorker
from jdml.communicate.pace.workers import ElasticWorker as ElasticWorker
from jdml.communicate.pace.workers import OptaxTask as OptaxTask
from jdml.communicate.pace.workers import RememberingTask as RememberingTask
from jdml.communicate.pace.workers import SgdWorker as SgdWorker
from jdml.communicate.pace.workers import Task as Task
from jdml.communicate.pace.workers import Towards as Towards
from jdml.communicate.pace.workers import Worker as Worker
