"""What runs passes: the manager, its cache, contracts, observers, names and parameters."""
