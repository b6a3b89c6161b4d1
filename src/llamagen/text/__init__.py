"""Captions and text features."""
