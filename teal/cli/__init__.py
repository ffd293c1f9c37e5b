"""Command lines: what they share (`command_line`), conversations in a terminal, and the commands themselves.

Only commands, benches and tests import from here.
"""
