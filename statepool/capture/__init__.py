"""
Capture working images, or a whole machine, as states: in one step even after a crash, by the
journal that a crash leaves.
"""
