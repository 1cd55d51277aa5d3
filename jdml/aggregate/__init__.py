"""Module 4: what becomes of the workers' answers, as Optax transformations over a mesh axis."""

from jdml.aggregate.average_params import AverageParamsState as AverageParamsState
from jdml.aggregate.average_params import average_params as average_params
from jdml.aggregate.mean_gradients import MeanGradientsState as MeanGradientsState
from jdml.aggregate.mean_gradients import mean_gradients as mean_gradients
