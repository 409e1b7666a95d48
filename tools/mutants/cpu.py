"""x"""
MUTANTS = []
PARTITION = []
