"""Whatever fsspec knows: SFTP and others."""
