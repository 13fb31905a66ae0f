"""Files of a web server, for reading."""
