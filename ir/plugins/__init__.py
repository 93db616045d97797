"""Classes that are found by name and made of plain data: what passes, losses and backends have in common."""
