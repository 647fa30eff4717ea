"""adapter_config.json: which fields are honoured, and what they ask of one base."""
