"""
Chains between a cache and its sources, and between sources: fetched, stored, copied, adopted, and
resumed where that was interrupted.
"""
