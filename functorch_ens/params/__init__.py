"""The parameters of an ensemble: how they are made, chosen, checked, stacked from trained models, and described."""
