"""Layouts: how engines name and cut a model's tensors, as data."""
