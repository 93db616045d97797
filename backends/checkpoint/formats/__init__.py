"""The formats that packed weights are written in, one file each."""
