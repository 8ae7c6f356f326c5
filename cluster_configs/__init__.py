"""Files for clusters in clouds and on one's own machines, and what checks and fills them in. Never imported by a run."""
