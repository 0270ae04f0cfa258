"""The providers that know users: tokens and a password of our own, or GitHub."""
