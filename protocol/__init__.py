"""What the two machines must agree on, and nothing else: errors, plans, messages, slices."""

VERSION = "0.2.0"
