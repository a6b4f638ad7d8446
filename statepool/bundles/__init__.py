"""
Bundles, files that hold one state each: export and import.

A bundle is a tar archive of a small pool (``docs/bundles.rst``). All bytes that are not data follow
from one record. So one module generates them (``contents.py``), and the reader compares them
instead of interpreting them.
"""
