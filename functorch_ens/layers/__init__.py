"""One file for each kind of layer: the layout of its weights, its pure form, its fast rule, its obstacle to vmap."""
