"""Backend "threads": workers that really do not wait, one thread and one device each.

::

    task = OptaxTask(loss_fn, optax.sgd(0.1), batches)
    server = Server(params, Rule(stale_synchronous(4), add(1 / 8)), num_workers=8)
    workers = [SgdWorker(k, task) for k in range(8)]
    run_threads(server, workers, num_versions=1000)
    run_threads(server, workers, num_versions=2000)  # goes on

``jdml.train.save_run`` saves such a run between two calls.
"""

from jdml.communicate.pace.threads.hogwild import HogwildRun as HogwildRun
from jdml.communicate.pace.threads.hogwild import Rows as Rows
from jdml.communicate.pace.threads.hogwild import hogwild as hogwild
from jdml.communicate.pace.threads.run import run_threads as run_threads
from jdml.communicate.pace.threads.wall import WallEvaluation as WallEvaluation
from jdml.communicate.pace.threads.wall import WallRun as WallRun
