"""Decentralized diffusion training (Paris, arXiv 2510.03434) on Ray.

The package imports nothing heavy: a job's driver stays light until it asks for a stage.
"""

__version__ = "0.1.0"
