"""The command line: ``shardtool save|load|verify|reshard|merge|inspect|trace|bench|pull|clean``.

::

    program     the group: signals, errors and exit codes
    options     flags that several commands share, and what their values may be
    commands    one function per command: flags -> settings -> operation -> report
    reports     what an operation returned, as lines, tables and JSON
    bench       the command of this name, with its report
    pull        the command of this name, with its report
    clean       the command of this name, with its report

Only click is imported until a command runs.
"""

from __future__ import annotations

from shardtool.cli import bench, clean, commands, pull
from shardtool.cli.program import main

__all__ = ["bench", "clean", "commands", "main", "pull"]
