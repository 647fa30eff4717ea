"""From PEFT files to the serving form and into the device pool."""
