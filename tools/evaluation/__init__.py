"""Evaluation of float models and artifacts: accuracy, perplexity, generation."""
