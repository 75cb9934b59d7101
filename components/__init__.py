"""Tensors in, tensors out: everything Limpid computes, with no Ray, DVC or MLflow in sight.

The floors, lowest first (a module imports only from floors below its own; `pyproject.toml`
holds this as import contracts)::

    draws, shards, data      noise keyed per image; Parquet folders; labelled images
    sources                  where raw images come from
    classifiers, purifiers   networks
    defense                  a classifier behind a purifier, and what an attack sees of it
    attacks, checkpoints     perturbations; model folders
    objectives, training     what is minimised; how
    evaluation, checks       scores; doubts about scores
"""
