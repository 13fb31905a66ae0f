"""Servers for tests: real ones in processes of their own, and a proxy that makes their answers go wrong.

::

    process    a program on a free port, started for the tests and ended with them
    proxy      between a client and a server: what is told to go wrong goes wrong
    weather    what goes wrong, chosen by a seed
    web        nginx, a server that says what it is told, a proxy for CONNECT
    s3 ...     one module for each kind of server, whose fixtures any test may ask for (``tests/conftest.py`` names it)

A server is started once per session, when it is first asked for.
"""

from tests.servers.proxy import Cut, Pipe, Proxy, Request, Trouble
from tests.servers.s3 import S3Server
from tests.servers.weather import Weather

__all__ = ["Cut", "Pipe", "Proxy", "Request", "S3Server", "Trouble", "Weather"]
