"""Text in and out of token ids. Used by server and training, never by the engine."""
