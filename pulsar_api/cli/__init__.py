"""The command pulsar-api, for people and scripts."""
