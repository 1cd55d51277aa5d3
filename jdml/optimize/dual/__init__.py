"""Dual methods: the samples' dual variables are ascended, and the duality gap certifies."""

from jdml.optimize.dual.cyclic import cyclic_dual_ascent as cyclic_dual_ascent
from jdml.optimize.dual.gap import duality_gap as duality_gap
from jdml.optimize.dual.newton import dual_newton as dual_newton
from jdml.optimize.dual.sdca import local_sdca as local_sdca
from jdml.optimize.dual.sdca import sdca as sdca
from jdml.optimize.dual.sdna import sdna as sdna
