"""Folders of this machine: durable, atomic, swept up after, read past the page cache where that is faster."""
