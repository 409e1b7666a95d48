"""Trains draft heads for a target: LongSpec blocks and EAGLE-3 heads."""
