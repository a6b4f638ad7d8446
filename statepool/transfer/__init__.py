"""
Between pools: bringing chains into the cache and from there to other pools, what stands on cached chains, and what may be trusted or thrown away.
"""
