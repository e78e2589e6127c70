"""A whole federation on one machine, as its user runs it: commands and HTTP, one process for each machine, real text."""
