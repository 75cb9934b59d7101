"""params.yaml: its sections and their rules, reading and writing YAML, and what each stage sees.

What a section describes (networks, attacks, sources) stands in `components`.
"""
