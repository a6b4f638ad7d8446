"""
Archives of directories and of pools, in the terms of AutoArchive: levels, keeping ids, restarts.

Each archive is a tar with a manifest beside it. A level is written whole or not at all, it is tied
to the level that it stands on, and it can be verified and restored.
"""
