"""Where users are known: tokens and a password of our own, or GitHub."""
