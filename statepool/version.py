"""The version, in the only place from which the code and the packaging read it."""

__version__ = "0.1.0"
