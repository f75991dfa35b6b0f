"""Weights on their way: converted into our form, and published on a Hub."""
