"""Tells errors of a user from bugs."""

from __future__ import annotations

# What the caller can put right is told in one line; all else is a bug, and shows itself whole.
EXPECTED = (ValueError, OSError, ImportError)


class UsageError(ValueError):
    """Says of options that they do not go together, or are out of range."""
