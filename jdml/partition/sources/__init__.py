"""Where samples come from: drawn for ever from a distribution, or from arrays and files.

``base.py`` says what a source is. Of a file larger than memory, see ``stream.py``.
"""

from jdml.partition.sources.base import PlacedBatches as PlacedBatches
from jdml.partition.sources.base import Source as Source
from jdml.partition.sources.distributions import gaussian_linear as gaussian_linear
from jdml.partition.sources.distributions import gaussian_logistic as gaussian_logistic
from jdml.partition.sources.libsvm import Examples as Examples
from jdml.partition.sources.libsvm import read_libsvm as read_libsvm
from jdml.partition.sources.libsvm import scan_libsvm as scan_libsvm
from jdml.partition.sources.minibatches import StreamBatches as StreamBatches
from jdml.partition.sources.minibatches import padded_rows as padded_rows
from jdml.partition.sources.npy import NpyRows as NpyRows
from jdml.partition.sources.npy import map_npy as map_npy
from jdml.partition.sources.offline import Offline as Offline
from jdml.partition.sources.online import Online as Online
from jdml.partition.sources.passes import accumulate as accumulate
from jdml.partition.sources.shared import SharedArrays as SharedArrays
from jdml.partition.sources.shared import share as share
from jdml.partition.sources.stream import ArrayStream as ArrayStream
from jdml.partition.sources.stream import Chunk as Chunk
from jdml.partition.sources.stream import LibsvmStream as LibsvmStream
from jdml.partition.sources.stream import NpyStream as NpyStream
from jdml.partition.sources.stream import Stream as Stream
from jdml.partition.sources.streamed_rows import StreamedRows as StreamedRows
from jdml.partition.sources.tokens import read_tokens as read_tokens
