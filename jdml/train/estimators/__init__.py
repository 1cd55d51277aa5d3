"""Linear models with scikit-learn's interface, above the solvers of ``jdml.optimize``.

Parameters mean what they mean in scikit-learn, whose checks of estimators these pass; what is
minimised stands in each docstring. A floor of its own: it joins ``jdml.models.linear`` with
``jdml.optimize``, and nothing else of jdml imports it.

    pip install 'jdml[estimators]'
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "jdml.train.estimators needs scikit-learn 1.6 or newer, whose base classes and checks of "
        "input it uses: pip install 'jdml[estimators]'. The models and solvers alone, "
        "jdml.models.linear and jdml.optimize, do without."
    ) from error

from jdml.train.estimators.logistic import LogisticRegression as LogisticRegression
from jdml.train.estimators.regression import ElasticNet as ElasticNet
from jdml.train.estimators.regression import Lasso as Lasso
from jdml.train.estimators.regression import LinearRegression as LinearRegression
from jdml.train.estimators.regression import PoissonRegressor as PoissonRegressor
from jdml.train.estimators.regression import Ridge as Ridge
from jdml.train.estimators.svm import LinearSVC as LinearSVC
