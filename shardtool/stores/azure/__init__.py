"""Blobs of Azure."""
