"""What compilers and devices make of kernels: instructions, registers, launches."""
