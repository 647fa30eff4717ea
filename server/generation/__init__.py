"""From a call for text to the events of its outputs."""
