"""Weights on their grids: rounded to nearest, or so that the error of a layer is least."""
