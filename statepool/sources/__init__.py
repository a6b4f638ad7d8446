"""
Sources, from which a cache is filled: what a source has of a state, which source is asked first,
whether several sources agree, and how well each source works.
"""
