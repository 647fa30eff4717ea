"""step = schedule → run → commit, on a thread of its own."""
