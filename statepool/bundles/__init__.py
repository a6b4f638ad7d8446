"""
One file that holds a state: export and import.

A bundle is a tar archive of a small pool (``docs/bundles.rst``). The bytes that are not data follow
from one record, so there is one module that knows them (``contents.py``), and the reader compares
instead of interpreting.
"""
