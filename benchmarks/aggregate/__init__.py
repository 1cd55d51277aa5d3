"""Step times of every aggregation against hand-written steps: see ``__main__``."""
