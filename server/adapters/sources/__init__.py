"""Where adapters come from: folders of this machine, and what an operator allows elsewhere.

A folder is read where it lies. What lies elsewhere (`hf:`, `s3://`, `gs://`, `https://`) is fetched
into the server's store first, like an upload that the server makes itself.
"""

from loramux.server.adapters.sources.folders import (
    MAX_SOURCE_LENGTH,
    Sources,
    refused,
    without_path,
)

__all__ = ["MAX_SOURCE_LENGTH", "Sources", "refused", "without_path"]
