"""
Capture working images, a whole machine, or copies of images that a user has got elsewhere, as
states: in one step even after a crash, by the journal that a crash leaves.
"""
