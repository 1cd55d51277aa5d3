"""The step, the loop, checkpoints, data and reports."""
