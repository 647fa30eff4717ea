"""What client and server agree on beside the messages of protos/loramux/v1."""

from __future__ import annotations

UPLOAD_TAKEN = ("loramux-upload", "taken")
"""Initial metadata of a server that has taken an upload's announcement and waits for the files."""
