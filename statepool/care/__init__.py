"""Maintain pools and caches: verify states, collect garbage, and diagnose what a host lacks."""
