"""Dividing a network by layer over a mesh axis: pipelines, their schedules, their timelines.

``schedule`` and ``schedules`` say in which order stages work; ``timetable`` makes ticks and slots
of it; ``layer`` takes a layer's backward pass apart; ``execute`` is the compiled program and
``pipeline`` its face; ``ends`` and ``rows`` lay out what the first and the final part read;
``checks`` refuses what does not fit; ``simulate`` and ``draw`` show what a schedule costs.
"""

from jdml.partition.pipeline.draw import draw as draw
from jdml.partition.pipeline.pipeline import Pipeline as Pipeline
from jdml.partition.pipeline.pipeline import pipeline as pipeline
from jdml.partition.pipeline.schedule import Schedule as Schedule
from jdml.partition.pipeline.schedules import gpipe as gpipe
from jdml.partition.pipeline.schedules import interleaved as interleaved
from jdml.partition.pipeline.schedules import one_f_one_b as one_f_one_b
from jdml.partition.pipeline.schedules import zero_bubble as zero_bubble
from jdml.partition.pipeline.simulate import Timeline as Timeline
from jdml.partition.pipeline.simulate import simulate as simulate
