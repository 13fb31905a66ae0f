"""Sinks: where the engine's tiles go."""
