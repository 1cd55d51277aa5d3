"""Module 2: what one worker does alone: solvers for one machine, primal and dual."""

from jdml.optimize.base import Method as Method
from jdml.optimize.base import Problem as Problem
from jdml.optimize.base import methods_for as methods_for
from jdml.optimize.first_order.accelerated import accelerated as accelerated
from jdml.optimize.first_order.frank_wolfe import frank_wolfe as frank_wolfe
from jdml.optimize.first_order.gradient_descent import gradient_descent as gradient_descent
from jdml.optimize.first_order.projected import projected as projected
from jdml.optimize.first_order.proximal import proximal as proximal
from jdml.optimize.solve import History as History
from jdml.optimize.solve import Solution as Solution
from jdml.optimize.solve import solve as solve
