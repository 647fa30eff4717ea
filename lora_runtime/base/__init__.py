"""One base model: transformers owns its definition, we own its linears, attention and rotary."""
