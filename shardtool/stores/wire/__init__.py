"""One room for everything that goes over HTTP: connections, ranges that are read until they are whole, retries."""
