"""Checks of what is stored: adversarial sets, and scores against each other."""
