"""The stages of dvc.yaml, one module each, by their names: `limpid NAME` runs one.

A stage reads folders, has tasks done, and writes folders; it imports no other stage.
"""
