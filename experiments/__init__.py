"""Experiments: which strategy learns faster and better, with unequal machines, settled by the project's own code paths.

An experiment is a TOML file; `python -m experiments run FILE --out DIR` carries it out, through real agents and the real
application in one process; see docs/evidence.md for what came of those that were run.
"""
