"""Everything Limpid computes, in pure torch: no Ray, DVC or MLflow, no YAML, no command line.

The layers, lowest first; a package imports only from layers below its own (held by the import
contracts in `pyproject.toml`)::

    config                  base class of every section of the parameters
    plugins                 kinds that other installed packages add
    data                    labelled images, Parquet shards, noise keyed per image
    sources                 where raw images come from
    models                  classifiers, purifiers, checkpoints; `Defense` and `Target`
    attacks, serving        perturbations and adversarial sets; a defense behind an endpoint
    probes                  measurements and attacks on one defense
    training, evaluation    objectives and the training loop; counted scores
    checks                  doubts about scores
    selftest                the same checks against defenses that are known to be broken
"""
