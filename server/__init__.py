"""Wires and words around the runtime: gRPC, CLI, metrics."""
