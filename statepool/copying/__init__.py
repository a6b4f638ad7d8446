"""
Move chains between a cache and its sources, and between sources: fetch, store, copy and adopt them,
and resume interrupted transfers.
"""
