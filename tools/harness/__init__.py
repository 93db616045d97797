"""Other people's evaluation harnesses, on artifacts in their runtime and on float models."""
