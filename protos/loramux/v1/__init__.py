"""The messages and services of the .proto files beside; `make protos` writes all the rest."""
