"""What a worker does between the server's answers, whatever the backend that drives it."""

from jdml.communicate.pace.workers.admm import AdmmWorker as AdmmWorker
from jdml.communicate.pace.workers.base import Compute as Compute
from jdml.communicate.pace.workers.base import Pull as Pull
from jdml.communicate.pace.workers.base import Push as Push
from jdml.communicate.pace.workers.base import RememberingTask as RememberingTask
from jdml.communicate.pace.workers.base import Run as Run
from jdml.communicate.pace.workers.base import Task as Task
from jdml.communicate.pace.workers.base import Towards as Towards
from jdml.communicate.pace.workers.base import Worker as Worker
from jdml.communicate.pace.workers.elastic import ElasticWorker as ElasticWorker
from jdml.communicate.pace.workers.optax_task import OptaxTask as OptaxTask
from jdml.communicate.pace.workers.sgd import SgdWorker as SgdWorker
