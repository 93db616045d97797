"""From simulated to integer: stored codes, groups, kernels."""
