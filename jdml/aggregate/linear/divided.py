"""What distributed methods ask of a problem's rows."""

from jdml.optimize.base import Problem


def divided_refusal(problem: Problem, way: str) -> str | None:
    """Why rows are not divided ``way``, "sample" or "feature", alone; None if they are."""
    rows = problem.rows
    if not hasattr(rows, "each"):
        return (
            f"its rows are not divided over workers; jdml.models.linear.divide(problem, "
            f"{way}s=…) divides them"
        )
    num_samples, num_features = rows.grid
    other = num_features if way == "sample" else num_samples
    if other > 1:
        return (
            f"its rows are divided {num_samples} × {num_features} by sample and feature; expected "
            f"by {way} alone"
        )
    return None
