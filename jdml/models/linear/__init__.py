"""Linear models: losses, penalties, rows and the problem that they make."""

from jdml.models.linear.losses import hinge as hinge
from jdml.models.linear.losses import logistic as logistic
from jdml.models.linear.losses import multinomial as multinomial
from jdml.models.linear.losses import poisson as poisson
from jdml.models.linear.losses import smoothed_hinge as smoothed_hinge
from jdml.models.linear.losses import squared as squared
from jdml.models.linear.losses import squared_hinge as squared_hinge
from jdml.models.linear.penalties import box as box
from jdml.models.linear.penalties import elastic_net as elastic_net
from jdml.models.linear.penalties import l1 as l1
from jdml.models.linear.penalties import l1_ball as l1_ball
from jdml.models.linear.penalties import l2 as l2
from jdml.models.linear.penalties import non_negative as non_negative
from jdml.models.linear.penalties import none as none
from jdml.models.linear.penalties import simplex as simplex
from jdml.models.linear.problem import LinearProblem as LinearProblem
from jdml.models.linear.problem import Weights as Weights
from jdml.models.linear.rows import Dense as Dense
from jdml.models.linear.rows import Sparse as Sparse
from jdml.models.linear.rows import as_rows as as_rows
from jdml.models.linear.shard import divide as divide
from jdml.models.linear.shard import shard_problem as shard_problem
