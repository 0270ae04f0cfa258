"""Builds the settings from options, file and environment."""
