"""The version, in the one place where the code and the packaging find it."""

__version__ = "0.1.0"
