"""Faults in the CUDA side."""
MUTANTS = []
