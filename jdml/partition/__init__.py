"""Module 1: how samples, features, layers and computation are divided.

``divisions``, ``label_skew``, ``features`` and ``coordinates`` give index sets per worker;
``samples`` says which of them make up which batch; ``sources`` says where samples come from.
"""

from jdml.partition.choose import Choice as Choice
from jdml.partition.choose import choose_partition as choose_partition
from jdml.partition.coordinates import coordinate_blocks as coordinate_blocks
from jdml.partition.coordinates import safe_damping as safe_damping
from jdml.partition.coordinates import separability as separability
from jdml.partition.coordinates import visits as visits
from jdml.partition.divisions import contiguous as contiguous
from jdml.partition.divisions import shuffle_split as shuffle_split
from jdml.partition.divisions import stratified as stratified
from jdml.partition.divisions import with_replacement as with_replacement
from jdml.partition.features import balanced_features as balanced_features
from jdml.partition.features import contiguous_features as contiguous_features
from jdml.partition.features import nonzeros_of_columns as nonzeros_of_columns
from jdml.partition.label_skew import label_skew as label_skew
from jdml.partition.samples import Sampler as Sampler
from jdml.partition.subnets import Subnets as Subnets
from jdml.partition.subnets import draw_subnets as draw_subnets
