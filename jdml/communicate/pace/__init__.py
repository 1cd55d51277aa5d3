"""Pace: when the workers' answers arrive, and who waits for whom."""

from jdml.communicate.pace.arrivals import Arrivals as Arrivals
from jdml.communicate.pace.arrivals import heavy_tailed as heavy_tailed
from jdml.communicate.pace.arrivals import log_normal as log_normal
from jdml.communicate.pace.arrivals import masked as masked
