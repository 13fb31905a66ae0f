"""The command line: ``shardtool save|load|verify|reshard|merge|inspect|trace``.

::

    program     the group: signals, errors and exit codes
    options     flags that several commands share, and what their values may be
    commands    one function per command: flags -> settings -> operation -> report
    reports     what an operation returned, as lines, tables and JSON

Only click is imported until a command runs.
"""

from __future__ import annotations

from shardtool.cli import commands
from shardtool.cli.program import main

__all__ = ["commands", "main"]
