"""Faster ways to compute what the models compute."""
