"""Layouts traced from an engine's own loader. ``child`` runs in the engine's process, ``parent`` in ours."""
