"""Self-contained HTML pages: building blocks and charts, for the cluster report and the report of a run."""
