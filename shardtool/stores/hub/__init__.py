"""Models of the Hugging Face hub, for reading."""
