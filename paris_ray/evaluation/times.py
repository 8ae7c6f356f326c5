"""Times of the diffusion at which losses are measured. Imports nothing."""

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
"""At t = 1 an expert of DDPM has no signal left (:class:`paris_ray.diffusion.path.Ddpm`)."""
