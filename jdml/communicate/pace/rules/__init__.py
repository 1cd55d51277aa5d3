"""What an arrival does: paces (who waits) and applies (what an update is), freely combined."""

from jdml.communicate.pace.rules.add import Add as Add
from jdml.communicate.pace.rules.add import add as add
from jdml.communicate.pace.rules.add import average as average
from jdml.communicate.pace.rules.backup import Backup as Backup
from jdml.communicate.pace.rules.backup import backup as backup
from jdml.communicate.pace.rules.base import Apply as Apply
from jdml.communicate.pace.rules.base import Book as Book
from jdml.communicate.pace.rules.base import Pace as Pace
from jdml.communicate.pace.rules.base import Rule as Rule
from jdml.communicate.pace.rules.consensus import Consensus as Consensus
from jdml.communicate.pace.rules.consensus import async_admm as async_admm
from jdml.communicate.pace.rules.dc_asgd import DelayCompensated as DelayCompensated
from jdml.communicate.pace.rules.dc_asgd import dc_asgd as dc_asgd
from jdml.communicate.pace.rules.dc_asgd import dc_asgd_adaptive as dc_asgd_adaptive
from jdml.communicate.pace.rules.delayed_nesterov import DelayedNesterov as DelayedNesterov
from jdml.communicate.pace.rules.delayed_nesterov import (
    DelayedNesterovState as DelayedNesterovState,
)
from jdml.communicate.pace.rules.delayed_nesterov import delayed_nesterov as delayed_nesterov
from jdml.communicate.pace.rules.delayed_nesterov import (
    local_steps_by_speed as local_steps_by_speed,
)
from jdml.communicate.pace.rules.elastic import ElasticCentre as ElasticCentre
from jdml.communicate.pace.rules.elastic import elastic_centre as elastic_centre
from jdml.communicate.pace.rules.optimise import Optimise as Optimise
from jdml.communicate.pace.rules.optimise import optimise as optimise
from jdml.communicate.pace.rules.partial_barrier import PartialBarrier as PartialBarrier
from jdml.communicate.pace.rules.partial_barrier import partial_barrier as partial_barrier
from jdml.communicate.pace.rules.stale_synchronous import StaleSynchronous as StaleSynchronous
from jdml.communicate.pace.rules.stale_synchronous import asynchronous as asynchronous
from jdml.communicate.pace.rules.stale_synchronous import stale_synchronous as stale_synchronous
from jdml.communicate.pace.rules.stale_synchronous import synchronous as synchronous
