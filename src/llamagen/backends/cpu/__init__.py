"""Operations for CPUs that torch has no fast one for, in C: a step of decoding, and a draw.

The source is compiled on the machine that runs it, once, for exactly that processor.
"""
