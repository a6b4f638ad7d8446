"""
The command line: one file per command.

``main`` finds the command and maps errors to exit codes; ``session`` holds what all commands share;
``output``, ``forms`` and ``report`` write text and JSON; ``progress`` draws a bar during a long
operation; ``drawing`` is the only module that imports rich.
"""
