"""Distributed solvers of linear models, over a mesh axis or simulated workers.

Each is a ``jdml.optimize.Method`` for ``solve``, on a problem that ``jdml.models.linear.divide``
has divided. Solvers of ``jdml.optimize`` that take whole passes need nothing of this: on rows that
``shard_problem`` has placed, the compiler inserts their reductions.
"""

from jdml.aggregate.linear.block_descent import gauss_seidel as gauss_seidel
from jdml.aggregate.linear.block_descent import jacobi as jacobi
from jdml.aggregate.linear.cocoa import cocoa as cocoa
from jdml.aggregate.linear.consensus import consensus as consensus
from jdml.aggregate.linear.feature_cocoa import feature_cocoa as feature_cocoa
from jdml.aggregate.linear.local_dual import LocalSDCA as LocalSDCA
from jdml.aggregate.linear.local_dual import LocalSDNA as LocalSDNA
from jdml.aggregate.linear.newton import dane as dane
from jdml.aggregate.linear.newton import giant as giant
from jdml.aggregate.linear.sharing import sharing as sharing
