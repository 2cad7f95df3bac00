"""Retrofill: event history filled in, in order, exactly once."""

__version__ = "0.1.0"
