"""HTTP to one function call in one short transaction; a file per audience."""
