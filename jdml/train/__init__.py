"""The step, the loop, checkpoints, data and reports."""

from jdml.train.checkpoint import Checkpointer as Checkpointer
from jdml.train.evaluate import make_evaluate as make_evaluate
from jdml.train.loop import FitResult as FitResult
from jdml.train.loop import fit as fit
from jdml.train.loss_scale import DynamicLossScaleState as DynamicLossScaleState
from jdml.train.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from jdml.train.metrics_log import MetricsLog as MetricsLog
from jdml.train.metrics_log import read_metrics as read_metrics
from jdml.train.pace import load_run as load_run
from jdml.train.pace import save_run as save_run
from jdml.train.state import TrainState as TrainState
from jdml.train.step import Step as Step
from jdml.train.step import make_step as make_step
