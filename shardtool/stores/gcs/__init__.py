"""Objects of Google Cloud Storage."""
