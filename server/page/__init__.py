"""The status page at `/`: files without a build step, and the JSON that they ask for."""
