"""The command line and what people see of a run: data files, metrics, evaluation, plans, reports."""
