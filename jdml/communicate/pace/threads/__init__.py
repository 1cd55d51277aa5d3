"""Backend "threads": workers that really do not wait, one thread and one device each."""

from jdml.communicate.pace.threads.hogwild import HogwildRun as HogwildRun
from jdml.communicate.pace.threads.hogwild import Rows as Rows
from jdml.communicate.pace.threads.hogwild import hogwild as hogwild
from jdml.communicate.pace.threads.run import run_threads as run_threads
from jdml.communicate.pace.threads.wall import WallEvaluation as WallEvaluation
from jdml.communicate.pace.threads.wall import WallRun as WallRun
