"""The check of a library: every kernel and every output against the Program."""
