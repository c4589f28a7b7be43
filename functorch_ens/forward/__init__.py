"""From parameters and inputs to the members' outputs: `make_forward` and `predict`."""
