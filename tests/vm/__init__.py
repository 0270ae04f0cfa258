"""The unit under systemd in a virtual machine; see ``__main__.py``."""
