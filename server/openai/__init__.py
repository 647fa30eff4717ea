"""OpenAI's HTTP API over a Service, and vLLM's calls for adapters and tokens."""
