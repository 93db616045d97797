"""What each element is, for any schedule: epilogues, weights, rows, attention."""
