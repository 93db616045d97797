"""Values that are far larger than others: found, and moved to where they do no harm."""
