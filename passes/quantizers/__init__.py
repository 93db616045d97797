"""Quantizers: where they stand, and their ranges."""
