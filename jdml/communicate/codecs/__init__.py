"""Wire formats: pure encoders from rows of floats to packed payloads, and back."""

from jdml.communicate.codecs.base import Codec as Codec
from jdml.communicate.codecs.base import Encoded as Encoded
from jdml.communicate.codecs.base import Payload as Payload
from jdml.communicate.codecs.block_int import BlockInt as BlockInt
from jdml.communicate.codecs.block_int import int2 as int2
from jdml.communicate.codecs.block_int import int4 as int4
from jdml.communicate.codecs.block_int import int8 as int8
from jdml.communicate.codecs.power_sgd import PowerSgd as PowerSgd
from jdml.communicate.codecs.power_sgd import PowerSgdState as PowerSgdState
from jdml.communicate.codecs.power_sgd import power_sgd as power_sgd
from jdml.communicate.codecs.random_k import RandomK as RandomK
from jdml.communicate.codecs.random_k import random_k as random_k
from jdml.communicate.codecs.threshold import Threshold as Threshold
from jdml.communicate.codecs.threshold import threshold as threshold
from jdml.communicate.codecs.top_k import TopK as TopK
from jdml.communicate.codecs.top_k import top_k as top_k
