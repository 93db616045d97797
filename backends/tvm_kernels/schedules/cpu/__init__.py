"""Kernels for CPUs: vectors of 16 lanes, weights in panels."""
