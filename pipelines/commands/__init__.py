"""The commands for people, one module each: `limpid NAME` runs one.

They read or change what the stages made, and are no part of `dvc repro`.
"""
