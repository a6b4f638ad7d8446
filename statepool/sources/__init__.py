"""
What a cache can be filled from: what a source has of a state, which source is asked first, whether
several mean the same, how well each works.
"""
