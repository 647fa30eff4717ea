"""One loop trains N adapters on the base that serves."""
