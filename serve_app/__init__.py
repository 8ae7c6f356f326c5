"""The Ray Serve application: HTTP ingress, sampler, expert groups."""
