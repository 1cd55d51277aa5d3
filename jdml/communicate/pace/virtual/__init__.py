"""Backend "virtual time": what a run would do, and how long it would take, without the wait."""

from jdml.communicate.pace.virtual.clock import VirtualClock as VirtualClock
from jdml.communicate.pace.virtual.clock import VirtualSeconds as VirtualSeconds
from jdml.communicate.pace.virtual.network import Network as Network
from jdml.communicate.pace.virtual.outage import Outage as Outage
from jdml.communicate.pace.virtual.records import Evaluation as Evaluation
from jdml.communicate.pace.virtual.records import Event as Event
from jdml.communicate.pace.virtual.records import VirtualRun as VirtualRun
from jdml.communicate.pace.virtual.simulate import simulate as simulate
