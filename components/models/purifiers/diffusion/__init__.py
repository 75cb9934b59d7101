"""Purifiers made of a small diffusion model: the network and its samplers, DiffDefense, DiffPure.

The loss that trains the network is in `components/training/generative.py`.
"""
