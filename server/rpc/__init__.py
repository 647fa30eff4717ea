"""The gRPC API: its server, and between its messages and the service's words."""
