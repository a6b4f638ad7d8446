"""Frozen values, and the rules for names. Nothing in this package does input or output."""
