"""What operators see of each call: records, log lines, traces and counts by method and route."""
