"""
What only a cache has: trusted files, the uses of chains, eviction, and the working images on which
machines run.
"""
