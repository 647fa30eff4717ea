"""The adapters of a server: their names, where they come from, and how they come and go."""
