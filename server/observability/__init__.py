"""What operators see: metrics, and of each call records, log lines, traces and counts."""
