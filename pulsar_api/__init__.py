"""A daemon that runs deployment tasks over HTTP and loses none of their output."""

__version__ = "0.1.0"
