"""
What only a cache has: which files are trusted, what stands on which chain, what is evicted, and the
working images that machines run on.
"""
