"""Text and token files, cut into sequences, drawn in a resumable order, placed on a mesh."""

from jdml.partition.sources.tokens import read_tokens as read_tokens
from jdml.train.data.batches import Batches as Batches
from jdml.train.data.corpus import Corpus as Corpus
from jdml.train.data.corpus import read_corpus as read_corpus
from jdml.train.data.text import read_text as read_text
from jdml.train.data.text import standard_library as standard_library
