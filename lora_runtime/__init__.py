"""The runtime: one base model, many adapters. Knows tokens and tensors; knows no wire format."""
