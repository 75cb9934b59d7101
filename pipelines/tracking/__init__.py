"""Everything of MLflow: runs of stages, events that wait for delivery, the registry, serving.

What is registered of a defense is described in `reporting.registration`.
"""
