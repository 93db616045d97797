"""From a Program to a Relax module that calls kernels."""
