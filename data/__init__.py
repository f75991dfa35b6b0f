"""Manifests, rows and tasks: what training and evaluation both read."""
