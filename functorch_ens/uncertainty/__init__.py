"""What the members say together, and how far to trust it."""
