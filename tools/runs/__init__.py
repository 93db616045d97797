"""Runs: from a model or a recipe to the artifact."""
