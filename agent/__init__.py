"""The program on a participating machine: it asks for jobs, trains on its own rows, and sends slices back."""
