"""Prefill, decode steps and who runs them; requests, sampling, speculation, streaming.

Import `engine` for one text at a time, `scheduler` for several, `speculation` for drafts.
"""
