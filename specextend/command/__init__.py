"""Holds the commands, one module each: its summary, its options, and what it runs.

They are made without what takes long to import; that comes when a command runs.
"""
