"""Trains the models of specextend/assets; the package itself does without."""
