"""Bits for each tensor: how much each costs, and the best assignment under a limit."""
