"""Module 3: what the workers say to each other: codecs, collectives, topology, frequency, pace."""

from jdml.communicate import codecs as codecs
from jdml.communicate import topology as topology
from jdml.communicate.collectives import all_gather as all_gather
from jdml.communicate.collectives import all_reduce_mean as all_reduce_mean
from jdml.communicate.collectives import all_to_all as all_to_all
from jdml.communicate.collectives import broadcast as broadcast
from jdml.communicate.collectives import reduce_scatter_mean as reduce_scatter_mean
from jdml.communicate.cost import Cost as Cost
from jdml.communicate.cost import Link as Link
from jdml.communicate.cost import predict as predict
from jdml.communicate.error_feedback import ErrorFeedback as ErrorFeedback
from jdml.communicate.error_feedback import error_feedback as error_feedback
from jdml.communicate.wire import Wire as Wire
from jdml.communicate.wire import on_shards as on_shards
from jdml.communicate.wire import per_worker as per_worker
from jdml.communicate.wire import varies as varies
