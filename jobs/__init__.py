"""One module per stage, each for ``ray job submit -- python -m jobs.NAME --config …``."""
