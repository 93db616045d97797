"""Passes that train a simulated Program: end to end or block by block, against a teacher, with losses found by name."""
