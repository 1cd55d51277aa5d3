"""The methods of the table: every solver of jdml, on rows divided each way that it can take."""

import optax

from jdml.aggregate.linear import (
    cocoa,
    consensus,
    dane,
    feature_cocoa,
    gauss_seidel,
    giant,
    jacobi,
    sharing,
)
from jdml.optimize import (
    Method,
    accelerated,
    coordinate_descent,
    cyclic_dual_ascent,
    dual_newton,
    gradient_descent,
    lbfgs,
    newton_cg,
    newton_cholesky,
    proximal,
    quasi_newton,
    saga,
    sdca,
    sdna,
    sgd,
    svrg,
)

WHOLE_PASSES: dict[str, Method] = {
    "gradient descent": gradient_descent(),
    "accelerated": accelerated(),
    "proximal": proximal(),
    "L-BFGS": lbfgs(),
    "Newton-CG": newton_cg(),
    "Newton-Cholesky": newton_cholesky(),
    "dual Newton": dual_newton(),
}
"""They know nothing of workers; the compiler inserts what travels."""

WORKERS: dict[str, Method] = {
    "consensus ADMM": consensus(),
    "DANE": dane(),
    "GIANT": giant(),
    "CoCoA+": cocoa(),
    "CoCoA+, σ' measured": cocoa(sigma="measured"),
    "CoCoA": cocoa(gamma=None),
    "feature CoCoA": feature_cocoa(),
    "Jacobi": jacobi(),
    "Gauss-Seidel": gauss_seidel(),
    "sharing ADMM": sharing(),
}
"""Of ``jdml.aggregate.linear``."""

SINGLE: dict[str, Method] = {
    "SGD": sgd(optax.sgd(0.1)),
    "SVRG": svrg(),
    "SAGA": saga(),
    "coordinate descent": coordinate_descent(),
    "quasi-Newton": quasi_newton(),
    "SDCA": sdca(),
    "cyclic ascent": cyclic_dual_ascent(),
    "SDNA": sdna(),
}
"""They take samples or columns one by one, and are refused where these are divided."""

METHODS = WHOLE_PASSES | WORKERS | SINGLE
DIVISIONS = ("sample", "feature", "both")
