"""How good images are: metrics on arrays."""
