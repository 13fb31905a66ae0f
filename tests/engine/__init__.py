"""Tests against the engines themselves: they need vLLM and are left out unless asked for (-m engine)."""
