"""Who talks to whom: graphs for methods without a centre."""

from jdml.communicate.topology.graph import Graph as Graph
from jdml.communicate.topology.graphs import complete as complete
from jdml.communicate.topology.graphs import exponential as exponential
from jdml.communicate.topology.graphs import from_edges as from_edges
from jdml.communicate.topology.graphs import one_peer_exponential as one_peer_exponential
from jdml.communicate.topology.graphs import random_pairs as random_pairs
from jdml.communicate.topology.graphs import random_regular as random_regular
from jdml.communicate.topology.graphs import ring as ring
from jdml.communicate.topology.graphs import star as star
from jdml.communicate.topology.graphs import torus as torus
from jdml.communicate.topology.mix import mix as mix
from jdml.communicate.topology.mix import neighbour_sum as neighbour_sum
from jdml.communicate.topology.permutations import Permutation as Permutation
from jdml.communicate.topology.picture import draw as draw
