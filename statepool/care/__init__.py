"""
Looking after pools and caches: reading states once more, taking away what nobody needs, and saying
what a host lacks.
"""
