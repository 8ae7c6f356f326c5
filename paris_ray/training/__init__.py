"""One optimisation loop, its checkpoints, and the Ray Train jobs of experts and router."""
