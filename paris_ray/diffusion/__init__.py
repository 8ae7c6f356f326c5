"""Paths, ensembles and solvers: the mathematics, in plain torch."""
