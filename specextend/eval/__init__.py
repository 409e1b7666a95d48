"""Measures speed, acceptance and exactness of methods over lengths of the prompt."""
