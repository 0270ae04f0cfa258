"""Makes the settings of options, file and environment."""
