"""How kernels go over their elements, target by target."""
