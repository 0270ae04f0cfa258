"""The HTTP side: requests to calls of the service, and its answers back."""
