"""Runs the command line as ``python -m specextend``."""

from .cli import main

raise SystemExit(main())
