"""Attacks that look for the nearest fooling image: CW, DeepFool, elastic net and targeted FAB.

The first three have no ball and return that image wherever it lies (`bounded` is false); FAB
returns only what lies inside the threat.
"""
