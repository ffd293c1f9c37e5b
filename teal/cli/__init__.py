"""Command lines: what they share (`command_line`, `options`), conversations in a terminal, and the commands themselves.

Only commands, benches and tests import from here.
"""
