"""
How working images, or all of a machine, become states: in one step whatever crashes, with the
journal that a crash leaves.
"""
