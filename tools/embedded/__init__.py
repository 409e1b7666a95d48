"""Training of the models in specextend/assets, which the package itself does without."""
