"""Evaluation: right answers counted and summed up, for defenses and for purifiers as detectors."""
