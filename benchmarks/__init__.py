"""Numbers, with the machine that they come from."""
