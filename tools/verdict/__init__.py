"""What a person asks of a quantized model: what it is, what it cost, whether it was verified; conditions on that."""
