"""Checkpoints in Redis: in chunks of our own, or as the values that SGLang serves from."""
