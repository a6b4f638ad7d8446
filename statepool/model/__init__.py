"""Frozen values and the rules for names. Nothing in here reads or writes anything."""
