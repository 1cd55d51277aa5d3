"""The step, the loop, checkpoints, data and reports."""

from jdml.train.state import TrainState as TrainState
from jdml.train.step import Step as Step
from jdml.train.step import make_step as make_step
