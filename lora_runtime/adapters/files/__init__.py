"""An adapter's folder, read without trust: bytes, JSON, tensors and their names."""
