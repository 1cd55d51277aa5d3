"""Module 2: what one worker does alone: solvers for one machine, primal and dual."""

from jdml.optimize.base import Method as Method
from jdml.optimize.base import Problem as Problem
from jdml.optimize.base import methods_for as methods_for
from jdml.optimize.dual.cyclic import cyclic_dual_ascent as cyclic_dual_ascent
from jdml.optimize.dual.newton import dual_newton as dual_newton
from jdml.optimize.dual.sdca import sdca as sdca
from jdml.optimize.dual.sdna import sdna as sdna
from jdml.optimize.first_order.accelerated import accelerated as accelerated
from jdml.optimize.first_order.frank_wolfe import frank_wolfe as frank_wolfe
from jdml.optimize.first_order.gradient_descent import gradient_descent as gradient_descent
from jdml.optimize.first_order.projected import projected as projected
from jdml.optimize.first_order.proximal import proximal as proximal
from jdml.optimize.second_order.lbfgs import lbfgs as lbfgs
from jdml.optimize.second_order.newton_cg import newton_cg as newton_cg
from jdml.optimize.second_order.newton_cholesky import newton_cholesky as newton_cholesky
from jdml.optimize.solve import History as History
from jdml.optimize.solve import Solution as Solution
from jdml.optimize.solve import solve as solve
from jdml.optimize.stochastic.coordinate_descent import coordinate_descent as coordinate_descent
from jdml.optimize.stochastic.quasi_newton import quasi_newton as quasi_newton
from jdml.optimize.stochastic.saga import saga as saga
from jdml.optimize.stochastic.sgd import sgd as sgd
from jdml.optimize.stochastic.svrg import svrg as svrg
