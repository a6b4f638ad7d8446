"""
Staging: each day, what the peers of a backup have collected comes into one directory for the day.

:mod:`~statepool.staging.stage` is the action; :mod:`~statepool.staging.settings` has its settings.
CedarBackup can be at either end: directories, indicators and rules are the same.
"""
