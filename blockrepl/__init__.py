"""Ordered, zero-loss remote copy for block volumes."""

__version__ = "0.1.0"
