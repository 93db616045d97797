"""Data: texts, tables and labels from files, as batches to calibrate, train and evaluate on."""
