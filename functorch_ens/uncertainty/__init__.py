"""Uncertainty measures of the members' outputs, and temperature scaling. Nothing here knows of models."""
